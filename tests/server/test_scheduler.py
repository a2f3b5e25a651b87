"""The scheduler, driven by a pure stand-in for the ranks: the frames' own rules say whether each frame was legal."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from server.frame import Admit, Join, Leave
from server.kv_budget import CacheCost, KVBudget, RankCost, Shape
from server.protocol import SamplingParams, Submit
from server.scheduler import GROWTH_TOKENS, Scheduler, Step

STOP = 7


class Ranks:
    """What every rank would hold after the frames so far; refuses a frame that does not fit it, as a rank does."""

    def __init__(self, budget: KVBudget) -> None:
        self.budget = budget
        self.prefilling: dict[int, int] = {}  # sequence: length
        self.groups: dict[int, dict[int, int]] = {}  # group: {sequence: length}, in row order

    def run(self, step: Step) -> None:
        for operation in step.frame.operations:
            match operation:
                case Admit(sequence_id=sequence_id):
                    assert not self.holds(sequence_id)
                    self.prefilling[sequence_id] = 0
                case Join(group_id=group_id, sequence_ids=sequence_ids):
                    group = self.groups.setdefault(group_id, {})
                    group.update({sequence_id: self.prefilling.pop(sequence_id) for sequence_id in sequence_ids})
                case Leave(sequence_ids=sequence_ids):
                    for sequence_id in sequence_ids:
                        assert self.holds(sequence_id)
                        self.prefilling.pop(sequence_id, None)
                        for group in self.groups.values():
                            group.pop(sequence_id, None)
                    self.groups = {group_id: group for group_id, group in self.groups.items() if group}
        frame = step.frame
        if frame.rows:
            rows = self.prefilling if frame.group_id is None else self.groups[frame.group_id]
            for row, token_ids in zip(frame.rows, step.token_ids, strict=True):
                rows[row.sequence_id] += len(token_ids)
                assert rows[row.sequence_id] == row.length
            assert frame.group_id is None or [row.sequence_id for row in frame.rows] == list(rows)
        self.check_budget()

    def holds(self, sequence_id: int) -> bool:
        return sequence_id in self.prefilling or any(sequence_id in group for group in self.groups.values())

    def check_budget(self) -> None:
        shapes = [Shape(len(group), max(group.values())) for group in self.groups.values()]
        assert self.budget.fits([*shapes, *(Shape(1, length) for length in self.prefilling.values() if length)])


def make_budget(capacity_tokens: int, *, batchable: bool = True) -> KVBudget:
    return KVBudget([RankCost([CacheCost(1)] * 4, batchable)], 1 << 40, max_tokens=capacity_tokens)


def make_scheduler(budget: KVBudget, **options: int) -> Scheduler:
    defaults = {"max_sequence_length": budget.capacity_tokens, "max_running": 8, "prefill_chunk_tokens": 256}
    return Scheduler(budget, **(defaults | options))


def submit(name: str, num_prompt: int = 10, max_tokens: int = 5, *, given_limit: bool = True) -> Submit:
    return Submit(name, list(range(100, 100 + num_prompt)), SamplingParams(), max_tokens, given_limit, [STOP])


def run_to_the_end(scheduler: Scheduler, ranks: Ranks, token_id: int = 50) -> tuple[dict[str, list[int]], list[Step]]:
    """Run until nothing is left to do; each request's tokens, and the steps."""
    outputs: dict[str, list[int]] = {}
    steps: list[Step] = []
    while (step := scheduler.schedule()) is not None:
        ranks.run(step)
        steps.append(step)
        sampled = [token_id] * len(step.frame.rows) if step.frame.group_id is not None else []
        for output in scheduler.complete(step.frame.frame_id, sampled):
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
        assert len(steps) < 100_000, "the scheduler does not come to an end"
    return outputs, steps


def test_a_request_is_prefilled_in_chunks_but_for_its_last_token_and_then_decoded():
    budget = make_budget(4096)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    scheduler.add(submit("a", num_prompt=600, max_tokens=3))
    outputs, steps = run_to_the_end(scheduler, ranks)
    assert [len(step.token_ids[0]) for step in steps if step.frame.rows] == [256, 256, 87, 1, 1, 1]
    assert outputs == {"a": [50, 50, 50]}
    assert steps[0].started == ["a"]
    assert not ranks.prefilling and not ranks.groups


def test_a_prompt_of_one_token_needs_no_prefill():
    budget = make_budget(1024)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    scheduler.add(submit("a", num_prompt=1, max_tokens=2))
    outputs, steps = run_to_the_end(scheduler, ranks)
    assert steps[0].frame.group_id is not None and outputs == {"a": [50, 50]}


def test_a_stop_id_ends_a_sequence_and_is_delivered():
    budget = make_budget(1024)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    scheduler.add(submit("a"))
    outputs, _ = run_to_the_end(scheduler, ranks, token_id=STOP)
    assert outputs == {"a": [STOP]}


def test_requests_that_arrive_together_decode_together():
    budget = make_budget(8192)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    for name in "abcd":
        scheduler.add(submit(name, num_prompt=20, max_tokens=6))
    _, steps = run_to_the_end(scheduler, ranks)
    assert [len(step.frame.rows) for step in steps if step.frame.group_id is not None] == [4] * 6


def test_running_streams_go_on_between_the_chunks_of_a_long_prompt():
    budget = make_budget(8192)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    scheduler.add(submit("short", num_prompt=5, max_tokens=50))
    for _ in range(3):
        step = scheduler.schedule()
        assert step is not None
        ranks.run(step)
        scheduler.complete(step.frame.frame_id, [50] * len(step.frame.rows) if step.frame.group_id is not None else [])
    scheduler.add(submit("long", num_prompt=1400, max_tokens=2))
    _, steps = run_to_the_end(scheduler, ranks)
    kinds = ["prefill" if step.frame.group_id is None else "decode" for step in steps[:10]]
    assert kinds == ["prefill", "decode"] * 5


def test_requests_that_do_not_fit_wait_their_turn():
    budget = make_budget(512)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    for name in "abc":
        scheduler.add(submit(name, num_prompt=200, max_tokens=20))
    step = scheduler.schedule()
    assert step is not None and (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    ranks.run(step)
    scheduler.complete(step.frame.frame_id, [])
    outputs, _ = run_to_the_end(scheduler, ranks)
    assert {name: len(tokens) for name, tokens in outputs.items()} == {"a": 20, "b": 20, "c": 20}


def test_a_long_prompt_does_not_pad_a_group_of_short_ones():
    budget = make_budget(16384)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    scheduler.add(submit("short", num_prompt=10, max_tokens=40))
    scheduler.add(submit("long", num_prompt=5000, max_tokens=40))
    _, steps = run_to_the_end(scheduler, ranks)
    assert len({step.frame.group_id for step in steps if step.frame.group_id is not None}) == 2


def test_caches_that_cannot_be_merged_run_as_groups_of_one():
    budget = make_budget(4096, batchable=False)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    for name in "abc":
        scheduler.add(submit(name))
    _, steps = run_to_the_end(scheduler, ranks)
    assert {len(step.frame.rows) for step in steps} <= {0, 1}


def test_a_client_that_leaves_frees_its_slot_with_the_next_frame():
    budget = make_budget(1024)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    scheduler.add(submit("a"))
    step = scheduler.schedule()
    assert step is not None
    ranks.run(step)
    scheduler.cancel("a")
    scheduler.cancel("a")
    assert scheduler.complete(step.frame.frame_id, []) == []
    outputs, steps = run_to_the_end(scheduler, ranks)
    assert outputs == {} and steps[0].frame.operations == [Leave([0])]
    assert not ranks.prefilling and not ranks.groups and scheduler.num_running == 0


def test_a_client_that_leaves_the_queue_is_never_admitted():
    budget = make_budget(1024)
    scheduler = make_scheduler(budget)
    scheduler.add(submit("a"))
    scheduler.cancel("a")
    assert scheduler.schedule() is None


def test_a_sequence_that_outgrows_the_cache_preempts_the_youngest_and_both_finish():
    budget = make_budget(2048)
    scheduler, ranks = make_scheduler(budget, max_sequence_length=1600), Ranks(budget)
    for name in ("old", "young"):
        scheduler.add(submit(name, num_prompt=300, max_tokens=1300, given_limit=False))
    outputs, steps = run_to_the_end(scheduler, ranks)
    assert {name: len(tokens) for name, tokens in outputs.items()} == {"old": 1300, "young": 1300}
    preempted = [operation for step in steps for operation in step.frame.operations if isinstance(operation, Admit)]
    assert [admit.sequence_id for admit in preempted][:3] == [0, 1, 1]
    assert 300 + GROWTH_TOKENS < 1300, "both were admitted at first"


def test_a_resumed_request_goes_on_after_the_ids_it_has():
    budget = make_budget(1024)
    scheduler, ranks = make_scheduler(budget), Ranks(budget)
    resumed = Submit("a", [1, 2, 3], SamplingParams(), 5, True, [STOP], output_token_ids=[4, 5])
    scheduler.add(resumed)
    outputs, steps = run_to_the_end(scheduler, ranks)
    assert steps[0].token_ids == [[1, 2, 3, 4]] and steps[1].token_ids == [[5]]
    assert outputs == {"a": [50, 50, 50]}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_sequence_is_lost_or_starved_and_the_budget_holds(data):
    capacity = data.draw(st.sampled_from([512, 1024, 4096]), "capacity")
    budget = make_budget(capacity, batchable=data.draw(st.booleans(), "batchable"))
    scheduler = make_scheduler(
        budget,
        max_running=data.draw(st.integers(1, 6), "max_running"),
        prefill_chunk_tokens=data.draw(st.sampled_from([16, 256]), "chunk"),
    )
    ranks = Ranks(budget)
    expected: dict[str, int] = {}
    got: dict[str, int] = {}
    for index in range(data.draw(st.integers(1, 12), "requests")):
        name = str(index)
        num_prompt = data.draw(st.integers(1, capacity // 2))
        max_tokens = data.draw(st.integers(1, capacity - num_prompt))
        scheduler.add(submit(name, num_prompt, max_tokens, given_limit=data.draw(st.booleans())))
        expected[name] = max_tokens
        for _ in range(data.draw(st.integers(0, 4))):
            if (step := scheduler.schedule()) is None:
                break
            ranks.run(step)
            if data.draw(st.booleans()) and expected:
                leaver = data.draw(st.sampled_from(sorted(expected)))
                scheduler.cancel(leaver)
                expected.pop(leaver)
            tokens = [50] * len(step.frame.rows) if step.frame.group_id is not None else []
            for output in scheduler.complete(step.frame.frame_id, tokens):
                got[output.request_id] = got.get(output.request_id, 0) + 1
    outputs, _ = run_to_the_end(scheduler, ranks)
    for name, tokens in outputs.items():
        got[name] = got.get(name, 0) + len(tokens)
    assert {name: got.get(name, 0) for name in expected} == expected
    assert not ranks.prefilling and not ranks.groups and scheduler.num_running == scheduler.num_waiting == 0
