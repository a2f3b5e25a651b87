"""The scheduler against a pure model of the ranks: every frame must be legal, and every answer the model's."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from server.admission import GROWTH_TOKENS
from server.frame import Admit, Keep, Leave
from server.kv_budget import MIB, CacheCost
from server.protocol import SamplingParams, TokenLogprobs
from tests.server.ranks_model import Ring, answer, logprobs_of, make_budget

GRAMMAR = SamplingParams(grammar="start: /a/")


def prompt_of(num_tokens: int, first: int = 100) -> list[int]:
    return list(range(first, first + num_tokens))


def kinds(steps) -> list[str]:
    return ["prefill" if step.frame.group_id is None else "decode" for step in steps if step.frame.rows]


def test_a_request_is_prefilled_in_chunks_but_for_its_last_token_and_then_decoded():
    ring = Ring(make_budget(4096), prefix_cache=False)
    ring.submit("a", 600, max_tokens=3)
    steps = ring.run()
    assert [len(step.token_ids[0]) for step in steps if step.frame.rows] == [256, 256, 87, 1, 1, 1]
    assert ring.outputs == {"a": answer(prompt_of(600), 3)}
    assert ring.started() == {"a": 0} and ring.ranks.is_empty


def test_a_prompt_of_one_token_needs_no_prefill():
    ring = Ring(make_budget(1024))
    ring.submit("a", 1, max_tokens=2)
    steps = ring.run()
    assert steps[0].frame.group_id is not None and ring.outputs == {"a": answer([100], 2)}


def test_a_stop_id_ends_a_sequence_and_is_delivered():
    ring = Ring(make_budget(1024))
    tokens = answer(prompt_of(10), 3)
    ring.submit("a", max_tokens=9, stop_token_ids=[tokens[2]])
    ring.run()
    assert ring.outputs["a"] == tokens[: tokens.index(tokens[2]) + 1] and ring.finished == {"a": "stop"}


def test_requests_that_arrive_together_decode_together():
    ring = Ring(make_budget(8192))
    for name in "abcd":
        ring.submit(name, 20, max_tokens=6)
    assert [len(step.frame.rows) for step in ring.run() if step.frame.group_id is not None] == [4] * 6


def test_running_streams_go_on_between_the_chunks_of_a_long_prompt():
    ring = Ring(make_budget(8192))
    ring.submit("short", 5, max_tokens=50)
    ring.run(3)
    ring.submit("long", prompt_of(1400, 5000), max_tokens=2)
    assert kinds(ring.run(10)) == ["prefill", "decode"] * 5


def test_a_short_prompt_goes_between_the_chunks_of_a_long_one():
    ring = Ring(make_budget(16384))
    ring.submit("long", prompt_of(4000), max_tokens=2)
    ring.run(2)
    ring.submit("short", prompt_of(30, 9000), max_tokens=2)
    ring.run()
    order = [row.sequence_id for step in ring.steps for row in step.frame.rows if step.frame.group_id is None]
    assert order.index(1) <= 3 and order.count(0) == 16


def test_short_prompts_share_a_frame_where_a_pass_costs_more_than_their_padding():
    ring = Ring(make_budget(16384), seconds=lambda tokens: 1.0 + 0.01 * tokens, chunk_tokens=None)
    for index, length in enumerate((20, 30)):  # two different ones, from which the cost of a pass shows
        ring.submit(f"first-{index}", prompt_of(length, 1000 * index), max_tokens=1)
        ring.run()
    for index in range(6):
        ring.submit(f"second-{index}", prompt_of(20 + 5 * index, 2000 + 1000 * index), max_tokens=3)
    steps = ring.run()
    assert max(len(step.frame.rows) for step in steps if step.frame.group_id is None) == 6
    for index in range(6):
        assert ring.outputs[f"second-{index}"] == answer(prompt_of(20 + 5 * index, 2000 + 1000 * index), 3)


def test_requests_that_do_not_fit_wait_their_turn():
    ring = Ring(make_budget(512))
    for index, name in enumerate("abc"):
        ring.submit(name, prompt_of(200, 1000 * index), max_tokens=20)
    ring.launch()
    assert (ring.scheduler.num_running, ring.scheduler.num_waiting) == (2, 1)
    ring.receive()
    ring.run()
    assert {name: len(tokens) for name, tokens in ring.outputs.items()} == {"a": 20, "b": 20, "c": 20}


def test_a_long_prompt_does_not_pad_a_group_of_short_ones():
    ring = Ring(make_budget(16384))
    ring.submit("short", 10, max_tokens=40)
    ring.submit("long", prompt_of(5000, 7000), max_tokens=40)
    assert len({step.frame.group_id for step in ring.run() if step.frame.group_id is not None}) == 2


def test_caches_that_cannot_be_merged_run_as_groups_of_one():
    ring = Ring(make_budget(4096, batchable=False), num_stages=2)
    for index in range(3):
        ring.submit(str(index), prompt_of(10, 1000 * index))
    assert {len(step.frame.rows) for step in ring.run()} <= {0, 1}
    assert len(ring.finished) == 3


def test_a_smaller_priority_is_served_first():
    ring = Ring(make_budget(4096), max_running=1)
    for name, priority in (("first", 0), ("late", 5), ("soon", -5)):
        ring.submit(name, max_tokens=2, priority=priority)
    ring.run()
    assert list(ring.finished) == ["soon", "first", "late"]


def test_a_client_that_leaves_frees_its_slot_with_the_next_frame():
    ring = Ring(make_budget(1024))
    ring.submit("a")
    ring.launch()
    ring.scheduler.cancel("a")
    ring.scheduler.cancel("a")
    assert ring.receive() == []
    steps = ring.run()
    assert ring.outputs == {} and steps[0].frame.operations == [Leave([0])]
    assert ring.ranks.is_empty and ring.scheduler.num_running == 0


def test_a_client_that_leaves_the_queue_is_never_admitted():
    ring = Ring(make_budget(1024))
    ring.submit("a")
    ring.scheduler.cancel("a")
    assert ring.launch() is None


def test_a_sequence_that_outgrows_the_cache_preempts_the_youngest_and_both_finish():
    ring = Ring(make_budget(2048), max_sequence_length=1600, prefix_cache=False)
    prompts = {"old": prompt_of(300), "young": prompt_of(300, 5000)}
    for name, prompt in prompts.items():
        ring.submit(name, prompt, max_tokens=1300, max_tokens_given=False, stop_token_ids=[])
    steps = ring.run()
    assert ring.outputs == {name: answer(prompt, 1300) for name, prompt in prompts.items()}
    admitted = [op.sequence_id for step in steps for op in step.frame.operations if isinstance(op, Admit)]
    assert admitted[:3] == [0, 1, 1] and ring.scheduler.counters().num_preemptions >= 1
    assert 300 + GROWTH_TOKENS < 1300, "both were admitted at first"


def test_a_resumed_request_goes_on_after_the_ids_it_has():
    ring = Ring(make_budget(1024))
    ring.submit("a", [1, 2, 3], output_token_ids=[4, 5])
    steps = ring.run()
    assert steps[0].token_ids == [[1, 2, 3, 4]] and steps[1].token_ids == [[5]]
    assert ring.outputs == {"a": answer([1, 2, 3, 4, 5], 3)}


def test_a_sequence_that_cannot_go_on_ends_with_its_error_and_the_others_go_on():
    ring = Ring(make_budget(8192), num_stages=2)
    for name in "abc":
        ring.submit(name, 20, max_tokens=10)
    ring.run(6)
    before = list(ring.outputs["b"])
    ring.failures[1] = "the grammar grew too large"
    ring.run()
    assert ring.finished == {"a": "length", "b": "error", "c": "length"}
    assert ring.outputs["b"][: len(before)] == before and len(ring.outputs["b"]) < 10
    assert ring.outputs["a"] == ring.outputs["c"] == answer(prompt_of(20), 10) and ring.ranks.is_empty


def test_stop_ids_reach_the_ranks_only_where_a_draw_depends_on_them():
    ring = Ring(make_budget(8192))
    for name, sampling in {
        "plain": SamplingParams(), "minimum": SamplingParams(min_tokens=1), "grammar": SamplingParams(grammar="…")
    }.items():  # fmt: skip
        ring.submit(name, 5, sampling=sampling, stop_token_ids=[3, 4])
    admits = [op for step in ring.run() for op in step.frame.operations if isinstance(op, Admit)]
    assert [admit.stop_token_ids for admit in admits] == [[], [3, 4], [3, 4]]


def test_long_grammars_that_come_together_go_with_several_frames():
    """The model of the ranks refuses a header that is too long."""
    ring = Ring(make_budget(65536), max_running=32)
    for index in range(12):
        ring.submit(str(index), 200, max_tokens=3, sampling=SamplingParams(grammar="g" * 2 * MIB))
    ring.run()
    assert len(ring.finished) == 12


# -- logprobs --------------------------------------------------------------------------------------------------------


def prompt_logprobs(prompt: list[int], num_top: int) -> dict[int, TokenLogprobs]:
    return {index: logprobs_of(prompt[: index + 1], num_top) for index in range(1, len(prompt))}


def answer_logprobs(prompt: list[int], num_tokens: int, num_top: int) -> list[TokenLogprobs]:
    tokens = [*prompt, *answer(prompt, num_tokens)]
    return [logprobs_of(tokens[: index + 1], num_top) for index in range(len(prompt), len(tokens))]


def test_each_request_of_a_batch_gets_the_logprobs_it_wants():
    ring = Ring(make_budget(8192))
    wants = {"none": None, "its own": 0, "three": 3, "five": 5}
    for name, num_top in wants.items():
        ring.submit(name, 20, max_tokens=4, sampling=SamplingParams(logprobs=num_top))
    ring.run()
    assert ring.logprobs.pop("none") == []
    assert ring.logprobs == {name: answer_logprobs(prompt_of(20), 4, wants[name] or 0) for name in ring.logprobs}


@pytest.mark.parametrize("num_tokens", [1, 2, 129, 700])
def test_a_prompts_logprobs_come_with_its_chunks_and_the_last_with_the_first_token(num_tokens: int):
    ring = Ring(make_budget(8192), num_stages=3)
    ring.submit("other", prompt_of(700, 5000), max_tokens=20)
    ring.submit("a", num_tokens, max_tokens=4, sampling=SamplingParams(prompt_logprobs=2, logprobs=1))
    ring.run()
    assert ring.prompt_logprobs["a"] == prompt_logprobs(prompt_of(num_tokens), 2)
    assert ring.logprobs["a"] == answer_logprobs(prompt_of(num_tokens), 4, 1)


def test_a_prompt_with_logprobs_is_computed_whole_whatever_is_kept_or_being_read_and_is_kept_for_others():
    ring = Ring(make_budget(16384), num_stages=2)
    ring.submit("kept", 600)
    ring.run()
    ring.submit("scored", 600, sampling=SamplingParams(prompt_logprobs=0))
    ring.submit("reading", prompt_of(600, 5000))
    ring.submit("scored beside", prompt_of(600, 5000), sampling=SamplingParams(prompt_logprobs=0))
    ring.run()
    ring.submit("scored first", prompt_of(600, 9000), sampling=SamplingParams(prompt_logprobs=0))
    ring.submit("after", prompt_of(600, 9000))
    ring.run()
    none = dict.fromkeys(["kept", "scored", "reading", "scored beside", "scored first"], 0)
    assert ring.started() == none | {"after": 599}
    assert ring.prompt_logprobs["scored"] == prompt_logprobs(prompt_of(600), 0)


@pytest.mark.parametrize(("who", "most_rows"), [([], 8), ([5], 7), (range(8), 3)])
def test_short_prompts_share_a_frame_only_as_long_as_its_logits_are_few(who, most_rows: int):
    ring = Ring(make_budget(16384), seconds=lambda tokens: 1.0 + 0.01 * tokens, chunk_tokens=None)
    for index, length in enumerate((20, 30)):
        ring.submit(f"first-{index}", prompt_of(length, 1000 * index), max_tokens=1)
        ring.run()
    for index in range(8):
        sampling = SamplingParams(prompt_logprobs=0 if index in who else None)
        ring.submit(f"second-{index}", prompt_of(40, 2000 + 1000 * index), max_tokens=3, sampling=sampling)
    packs = [len(step.frame.rows) for step in ring.run() if step.frame.group_id is None]
    assert max(packs) == most_rows and sum(packs) == 8


def test_a_replayed_request_gets_the_logprobs_of_its_prompt_again_and_none_of_what_it_has():
    ring = Ring(make_budget(8192))
    prompt = prompt_of(300)
    tokens = answer(prompt, 6)
    sampling = SamplingParams(prompt_logprobs=1, logprobs=0)
    ring.submit("a", prompt, max_tokens=6, sampling=sampling, output_token_ids=tokens[:4])
    ring.run()
    assert ring.outputs["a"] == tokens[4:]
    assert ring.prompt_logprobs["a"] == prompt_logprobs(prompt, 1)
    assert ring.logprobs["a"] == answer_logprobs(prompt, 6, 0)[4:]


# -- several frames in flight ----------------------------------------------------------------------------------------


def test_groups_take_turns_so_that_every_stage_has_one():
    ring = Ring(make_budget(8192), num_stages=2, num_groups=2, prefix_cache=False)
    for index in range(4):
        ring.submit(str(index), prompt_of(20, 1000 * index), max_tokens=20)
    ring.run(30)
    while ring.launch() is not None:
        pass
    assert ring.num_in_flight == 2
    groups = [step.frame.group_id for step in ring.steps if step.frame.group_id is not None]
    assert all(a != b for a, b in zip(groups[-8:], groups[-7:], strict=False)) and len(set(groups[-8:])) == 2
    ring.run()
    assert all(ring.outputs[str(i)] == answer(prompt_of(20, 1000 * i), 20) for i in range(4))


def test_the_chunks_of_a_prompt_follow_each_other_without_waiting():
    ring = Ring(make_budget(8192), num_stages=3)
    ring.submit("a", 2000)
    while ring.launch() is not None:
        pass
    assert kinds(ring.steps) == ["prefill"] * 4 and ring.num_in_flight == 4


def test_a_group_is_split_when_step_times_say_so_and_rows_leave_evenly():
    ring = Ring(make_budget(16384), num_stages=2, seconds=lambda rows: 0.001 + 0.01 * rows, prefix_cache=False)
    for index in range(8):
        ring.submit(str(index), prompt_of(20, 1000 * index), max_tokens=60 + index)
    steps = ring.run()
    sizes = [len(step.frame.rows) for step in steps if step.frame.group_id is not None]
    assert 8 in sizes[:10] and sizes[30:80] == [4] * 50, "one group until measured, then two"
    assert all(ring.outputs[str(i)] == answer(prompt_of(20, 1000 * i), 60 + i) for i in range(8))


def test_one_group_stays_one_where_a_step_costs_the_same_at_any_size():
    ring = Ring(make_budget(16384), num_stages=2, seconds=lambda rows: 0.01, prefix_cache=False)
    for index in range(8):
        ring.submit(str(index), prompt_of(20, 1000 * index), max_tokens=60)
    sizes = [len(step.frame.rows) for step in ring.run() if step.frame.group_id is not None]
    assert sizes.count(8) > 40


def test_groups_that_drift_apart_are_evened_out():
    ring = Ring(make_budget(16384), num_stages=2, num_groups=2, prefix_cache=False)
    for index in range(8):
        ring.submit(str(index), prompt_of(20, 1000 * index), max_tokens=200 if index % 2 else 10, priority=index % 2)
    ring.run(60)
    groups = [step for step in ring.run(8) if step.frame.group_id is not None]
    assert {len(step.frame.rows) for step in groups} == {2}
    ring.run()
    assert all(ring.outputs[str(i)] == answer(prompt_of(20, 1000 * i), 200 if i % 2 else 10) for i in range(8))


def test_a_preempted_sequence_that_is_back_before_its_frame_takes_the_frames_token_and_goes_on():
    ring = Ring(make_budget(3072), num_stages=4, num_groups=2, chunk_tokens=1024, max_sequence_length=1200)
    for index, name in enumerate(("old", "middle", "large", "young")):
        ring.submit(name, prompt_of(20, 1000 * index), 900, max_tokens_given=False, stop_token_ids=[])
    while not ring.scheduler.counters().num_preemptions:
        if ring.launch() is None:
            ring.receive()
    assert ring.num_in_flight, "the preempted sequence's frame among them"
    ring.scheduler.cancel("large")
    ring.run()
    assert ring.outputs["young"] == answer(prompt_of(20, 3000), 900)
    assert ring.ranks.is_empty and ring.scheduler.num_running == 0


def test_the_api_hears_of_a_preemption_and_of_the_new_start():
    ring = Ring(make_budget(2048), max_sequence_length=1600, prefix_cache=False)
    for name, prompt in {"old": prompt_of(300), "young": prompt_of(300, 5000)}.items():
        ring.submit(name, prompt, max_tokens=1300, max_tokens_given=False, stop_token_ids=[])
    ring.run()
    news = [(name, kind) for step in ring.steps for name, kind in [
        *((request_id, "preempted") for request_id in step.preempted),
        *((started.request_id, "started") for started in step.started),
    ] if name == "young"]  # fmt: skip
    assert len(news) > 2 and [kind for _, kind in news] == ["started", "preempted"] * (len(news) // 2) + ["started"]


# -- the prefix cache ------------------------------------------------------------------------------------------------

WINDOWED = [CacheCost(1), CacheCost(1, window=256)]
STATE_SPACE = [CacheCost(1), CacheCost(0, None, 1000)]


def num_prefilled(ring: Ring) -> int:
    return sum(row.num_tokens for step in ring.steps for row in step.frame.rows if step.frame.group_id is None)


@pytest.mark.parametrize("caches", [None, WINDOWED, STATE_SPACE], ids=["attention", "windowed", "state-space"])
def test_a_second_turn_computes_only_what_is_new(caches):
    ring = Ring(make_budget(8192, caches=caches))
    first = prompt_of(700)
    ring.submit("first", first, max_tokens=40)
    ring.run()
    second = [*first, *ring.outputs["first"], *prompt_of(30, 3000)]
    ring.steps.clear()
    ring.submit("second", second, max_tokens=5)
    ring.run()
    assert ring.started() == {"second": 739} and num_prefilled(ring) == 30
    assert ring.outputs["second"] == answer(second, 5)


@pytest.mark.parametrize("caches", [None, WINDOWED, STATE_SPACE], ids=["attention", "windowed", "state-space"])
def test_identical_prompts_at_once_are_prefilled_once(caches):
    ring = Ring(make_budget(16384, caches=caches), num_stages=2)
    for index in range(4):
        ring.submit(str(index), 700, max_tokens=6)
    ring.run()
    assert num_prefilled(ring) == 699 and sorted(ring.started().values()) == [0, 699, 699, 699]
    assert all(tokens == answer(prompt_of(700), 6) for tokens in ring.outputs.values())


@pytest.mark.parametrize("caches", [None, WINDOWED, STATE_SPACE], ids=["attention", "windowed", "state-space"])
def test_users_who_share_a_system_prompt_prefill_it_once(caches):
    ring = Ring(make_budget(16384, caches=caches), num_stages=2)
    prompts = [[*prompt_of(500), *prompt_of(40, 2000 * (index + 1))] for index in range(6)]
    for index, prompt in enumerate(prompts):
        ring.submit(str(index), prompt, max_tokens=4)
    ring.run()
    assert num_prefilled(ring) == 500 + 40 * 6 - 6
    assert all(ring.outputs[str(index)] == answer(prompt, 4) for index, prompt in enumerate(prompts))


def test_nobody_waits_for_a_shared_prefix_that_is_far_away_or_of_lower_priority():
    shared = prompt_of(100)
    ring = Ring(make_budget(65536), max_running=16)
    for index in range(4):
        ring.submit(f"long-{index}", prompt_of(4000, 100_000 * (index + 1)), max_tokens=5)
    ring.submit("far", [*shared, *prompt_of(3900, 900_000)], max_tokens=5)
    ring.submit("short", [*shared, *prompt_of(50, 30_000)], max_tokens=5)
    ring.run(6)
    assert "short" in ring.outputs
    ring = Ring(make_budget(65536), num_stages=2)
    ring.submit("batch job", [*shared, *prompt_of(3900, 900_000)], max_tokens=5, priority=5)
    ring.launch()
    ring.submit("user", [*shared, *prompt_of(50, 30_000)], max_tokens=5)
    ring.run(8)
    assert "user" in ring.outputs and "batch job" not in ring.outputs


def test_users_who_come_one_after_the_other_share_a_system_prompt_from_the_third_on_where_caches_cannot_be_cut():
    ring = Ring(make_budget(16384, caches=STATE_SPACE))
    for index in range(4):
        ring.submit(str(index), [*prompt_of(500), *prompt_of(40, 2000 * (index + 1))], max_tokens=4)
        ring.run()
    assert list(ring.started().values()) == [0, 0, 500, 500]


def test_entries_give_way_to_running_sequences_least_recently_used_first():
    ring = Ring(make_budget(2048))
    for index in range(4):
        ring.submit(str(index), prompt_of(300, 1000 * index), max_tokens=20)
        ring.run()
    ring.submit("again", prompt_of(300, 3000), max_tokens=20)
    ring.submit("gone", prompt_of(300, 0), max_tokens=20)
    ring.run()
    assert ring.started()["again"] == 299 and ring.started()["gone"] == 0


def test_a_chat_that_fills_the_cache_takes_its_entry_over():
    ring = Ring(make_budget(1280))
    first = prompt_of(900)
    ring.submit("first", first, max_tokens=40)
    ring.run()
    ring.submit("second", [*first, *ring.outputs["first"], *prompt_of(60, 3000)], max_tokens=40)
    ring.run()
    assert ring.started()["second"] == 939
    taken = [op for step in ring.steps for op in step.frame.operations if isinstance(op, Admit) and op.takes_entry]
    assert len(taken) == 1


def test_nothing_is_kept_where_caches_cannot_be_copied_or_the_key_says_no():
    for ring in (Ring(make_budget(8192, can_keep=False)), Ring(make_budget(8192), prefix_cache=False)):
        for name in "ab":
            ring.submit(name, 300)
            ring.run()
        assert set(ring.started().values()) == {0}
        assert not any(isinstance(op, Keep) for step in ring.steps for op in step.frame.operations)


# -- grammars that are not compiled yet ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_sequence_whose_grammar_is_being_compiled_holds_up_nobody(num_stages: int):
    ring = Ring(make_budget(4096), num_stages=num_stages, grammar_frames=12)
    ring.submit("slow", prompt_of(20), max_tokens=3, sampling=GRAMMAR)
    ring.submit("other", prompt_of(20, 5000), max_tokens=30)
    ring.run(10)
    assert len(ring.outputs["other"]) >= 5 and "slow" not in ring.outputs
    ring.run()
    assert ring.outputs == {"slow": answer(prompt_of(20), 3), "other": answer(prompt_of(20, 5000), 30)}
    assert not any(step.frame.awaits_grammar for step in ring.steps), "there was always something to do"


@pytest.mark.parametrize("num_stages", [1, 3])
def test_the_last_rank_is_asked_by_one_frame_at_a_time_where_nobody_else_runs(num_stages: int):
    ring = Ring(make_budget(4096), num_stages=num_stages, grammar_frames=5)
    ring.submit("slow", 1, max_tokens=3, sampling=GRAMMAR)
    steps = ring.run()
    assert [step.frame.awaits_grammar for step in steps if not step.frame.rows][:6] == [True] * 6
    assert ring.outputs == {"slow": answer(prompt_of(1), 3)}
    ring.submit("left", 1, sampling=GRAMMAR)
    assert ring.launch() is not None and ring.launch() is None
    ring.scheduler.cancel("left")
    ring.run()
    assert "left" not in ring.outputs and ring.scheduler.num_running == 0


def test_a_grammar_that_cannot_be_compiled_ends_its_sequence_with_an_error():
    ring = Ring(make_budget(4096), grammar_frames=2)
    ring.submit("broken", sampling=GRAMMAR)
    ring.failures = {0: "start: ("}
    ring.run()
    assert ring.finished == {"broken": "error"}


# -- anything at all -------------------------------------------------------------------------------------------------

CACHES = {"attention": None, "windowed": WINDOWED, "state-space": STATE_SPACE}
SAMPLING = [
    SamplingParams(),
    SamplingParams(logprobs=2),
    SamplingParams(prompt_logprobs=0),
    SamplingParams(logprobs=0, prompt_logprobs=3),
    SamplingParams(grammar="start: /a/"),
]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_sequence_is_lost_starved_or_wrong_and_the_budget_holds(data):
    capacity = data.draw(st.sampled_from([512, 1024, 4096]), "capacity")
    batchable = data.draw(st.booleans(), "batchable")
    budget = make_budget(
        capacity,
        batchable=batchable,
        can_pack=data.draw(st.booleans(), "can_pack"),
        caches=CACHES[data.draw(st.sampled_from(sorted(CACHES)), "caches")],
    )
    per_row = data.draw(st.sampled_from([0.0, 0.01]), "seconds a row")
    ring = Ring(
        budget,
        num_stages=data.draw(st.integers(1, 4), "stages"),
        seconds=lambda rows: 0.01 + per_row * rows,
        grammar_frames=data.draw(st.sampled_from([0, 1, 9]), "frames that a grammar takes"),
        max_running=data.draw(st.integers(1, 6), "max_running"),
        chunk_tokens=data.draw(st.sampled_from([16, 256, None]), "chunk"),
        num_groups=data.draw(st.sampled_from([None, 1, 2, 3]), "groups"),
        prefix_cache=data.draw(st.booleans(), "prefix_cache"),
    )
    prompts: dict[str, list[int]] = {}
    wanted: dict[str, int] = {}
    samplings: dict[str, SamplingParams] = {}
    for index in range(data.draw(st.integers(1, 12), "requests")):
        name = str(index)
        prompt = prompt_of(data.draw(st.integers(1, capacity // 2)), data.draw(st.sampled_from([100, 5000])))
        if prompts and data.draw(st.booleans(), "extends another"):
            other = data.draw(st.sampled_from(sorted(prompts)))
            prompt = ([*prompts[other], *ring.outputs.get(other, []), *prompt])[: capacity // 2]
        max_tokens = data.draw(st.integers(1, min(capacity - len(prompt), 700)))
        given_limit = data.draw(st.booleans())
        options = {"priority": data.draw(st.integers(0, 1)), "sampling": data.draw(st.sampled_from(SAMPLING))}
        ring.submit(name, prompt, max_tokens, max_tokens_given=given_limit, stop_token_ids=[], **options)
        prompts[name], wanted[name], samplings[name] = prompt, max_tokens, options["sampling"]
        for _ in range(data.draw(st.integers(0, 6))):
            if data.draw(st.booleans(), "receive") and ring.num_in_flight:
                ring.receive()
            else:
                ring.launch()
            if data.draw(st.integers(0, 9), "cancel") == 0 and wanted:
                leaver = data.draw(st.sampled_from(sorted(wanted)))
                ring.scheduler.cancel(leaver)
                wanted.pop(leaver)
    ring.run()
    assert {name: ring.outputs[name] for name in wanted} == {
        name: answer(prompts[name], num_tokens) for name, num_tokens in wanted.items()
    }
    for name, num_tokens in wanted.items():
        if (num_top := samplings[name].logprobs) is not None:
            assert ring.logprobs[name] == answer_logprobs(prompts[name], num_tokens, num_top)
        if (num_top := samplings[name].prompt_logprobs) is not None:
            assert ring.prompt_logprobs[name] == prompt_logprobs(prompts[name], num_top)
    assert ring.ranks.is_empty and ring.scheduler.num_running == ring.scheduler.num_waiting == 0
