"""Real rings of 1, 2 and 3 processes with a tiny random model: what goes round, what comes back, what fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from server.protocol import SamplingParams, SequenceOutput, Stats, StepOutput
from tests.ring_harness import RingUnderTest, python, running_ring

pytestmark = pytest.mark.ring

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [3] * 40, list(range(20, 60)), [9, 8, 7]]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def reference(tiny_chat_model: Path) -> list[list[int]]:
    done = python("-m", "tests.server.reference", str(tiny_chat_model), str(MAX_TOKENS), stdin=json.dumps(PROMPTS))
    return json.loads(done.splitlines()[-1])["answers"]


@pytest.fixture(scope="module", params=[1, 2, 3], ids="P={}".format)
def ring(request: pytest.FixtureRequest, tiny_chat_model: Path):
    with running_ring(tiny_chat_model, request.param, prefill_chunk_tokens=16) as ring:
        ready = ring.wait_ready()
        assert [info.rank for info in ready.ranks] == list(range(request.param))
        yield ring


def test_greedy_tokens_equal_the_unsplit_models(ring: RingUnderTest, reference: list[list[int]]):
    for index, prompt in enumerate(PROMPTS):
        ring.submit(f"alone-{index}", prompt, MAX_TOKENS)
        tokens = ring.collect(f"alone-{index}")[f"alone-{index}"]
        assert tokens == reference[index][: len(tokens)] and len(tokens) == MAX_TOKENS


def test_requests_that_join_and_leave_at_different_times_do_not_change_each_other(
    ring: RingUnderTest, reference: list[list[int]]
):
    lengths = {f"together-{index}": MAX_TOKENS - index for index in range(len(PROMPTS))}
    for index, (name, length) in enumerate(lengths.items()):
        ring.submit(name, PROMPTS[index], length)
    tokens = ring.collect(*lengths)
    for index, (name, length) in enumerate(lengths.items()):
        assert tokens[name] == reference[index][:length]


def test_a_seeded_sample_is_the_same_alone_and_among_others(ring: RingUnderTest):
    sampling = SamplingParams(temperature=1.2, top_p=0.95, seed=1234)
    ring.submit("alone", PROMPTS[0], 20, sampling=sampling)
    alone = ring.collect("alone")["alone"]
    for index in range(4):
        ring.submit(f"other-{index}", PROMPTS[index], 15, sampling=SamplingParams(seed=index))
    ring.submit("among", PROMPTS[0], 20, sampling=sampling)
    among = ring.collect("among", *(f"other-{index}" for index in range(4)))["among"]
    assert among == alone


def test_a_replayed_request_goes_on_as_if_nothing_had_happened(ring: RingUnderTest):
    sampling = SamplingParams(temperature=1.0, seed=77, frequency_penalty=0.5, repetition_penalty=1.2)
    ring.submit("whole", PROMPTS[3], 16, sampling=sampling)
    whole = ring.collect("whole")["whole"]
    ring.submit("again", PROMPTS[3], 16, sampling=sampling, output_token_ids=whole[:7])
    assert ring.collect("again")["again"] == whole[7:]


def test_a_stop_id_ends_the_answer(ring: RingUnderTest, reference: list[list[int]]):
    stop = reference[0][2]
    ring.submit("stopped", PROMPTS[0], MAX_TOKENS, stop_token_ids=[stop])
    outputs = list(ring.outputs(1))
    assert outputs[-1].finish_reason == "stop"
    tokens = [token_id for output in outputs for token_id in output.token_ids]
    assert tokens == reference[0][: reference[0].index(stop) + 1]


def test_a_request_that_cannot_be_served_gets_an_error_and_the_ring_goes_on(ring: RingUnderTest):
    ring.submit("out of range", [1, 2, 1_000_000], 5)
    ring.submit("negative", [-1], 5)
    ring.submit("empty", [], 5)
    ring.submit("bias", [1], 5, sampling=SamplingParams(temperature=0, logit_bias={99_999_999: 1.0}))
    errors = {output.request_id: output for output in ring.outputs(4)}
    assert all(output.finish_reason == "error" for output in errors.values())
    assert "outside the vocabulary" in (errors["out of range"].error or "")
    assert "empty" in (errors["empty"].error or "")
    ring.submit("after", PROMPTS[0], 3)
    assert len(ring.collect("after")["after"]) == 3


def test_a_cancelled_request_frees_its_caches_on_every_rank(ring: RingUnderTest):
    ring.submit("cancelled", PROMPTS[3], 1900)
    first = next(iter(ring.outputs(1)))
    assert isinstance(first, SequenceOutput)
    ring.wait_stats(lambda stats: all(info.kv_cache_bytes > 0 for info in stats.ranks))
    ring.cancel("cancelled")
    stats = ring.wait_stats(
        lambda stats: stats.num_running == 0 and all(r.kv_cache_bytes == r.prefix_cache_bytes for r in stats.ranks)
    )
    assert stats.num_frames_in_flight == 0


def test_a_preempted_request_only_pauses(tiny_chat_model: Path):
    """Both are let in with room for 512 more tokens, six blocks in all, and grow by one, which the cache has not."""
    prompts = [[5, 6, 7] * 80, [8, 9] * 120]
    num_tokens = 560
    done = python("-m", "tests.server.reference", str(tiny_chat_model), str(num_tokens), stdin=json.dumps(prompts))
    answers = json.loads(done.splitlines()[-1])["answers"]
    with running_ring(tiny_chat_model, 2, kv_cache_max_size=1536, micro_batch_groups=2) as ring:
        ring.wait_ready()
        for index, prompt in enumerate(prompts):
            ring.submit(str(index), prompt, num_tokens, max_tokens_given=False)
        tokens = ring.collect("0", "1")
        assert [tokens["0"], tokens["1"]] == answers
        ring.wait_stats(lambda stats: stats.counters.num_preemptions > 0)


def test_all_ranks_end_when_the_api_goes_away(tiny_chat_model: Path):
    with running_ring(tiny_chat_model, 3) as ring:
        ring.wait_ready()
        ranks = ring.processes()[1:]
        ring.hang_up()
        for rank in ranks:
            rank.wait(timeout=10)


def test_an_idle_ring_sleeps(tiny_chat_model: Path):
    """3 ranks, mlx.launch included; 2 s of one core in 20 s would be the spinning this is about."""
    with running_ring(tiny_chat_model, 3) as ring:
        ring.wait_ready()
        processes = ring.processes()
        ring.wait_stats(lambda stats: True)
        used = [-sum(process.cpu_times()[:2]) for process in processes]
        started = time.monotonic()
        while time.monotonic() - started < 8:
            ring.next()
        used = [before + sum(process.cpu_times()[:2]) for before, process in zip(used, processes, strict=True)]
        assert sum(used) / (time.monotonic() - started) < 0.10, used


def test_a_failure_of_any_rank_reaches_the_api_with_its_reason(tmp_path: Path, tiny_chat_model: Path):
    with running_ring(tmp_path / "missing", 2) as ring:
        failed = ring.wait_failed()
        assert failed.permanent and "rank 0" in failed.message and "missing" in failed.message
    with running_ring(tiny_chat_model, 2, layer_split="1,1") as ring:
        failed = ring.wait_failed()
        assert failed.permanent and "LAYER_SPLIT" in failed.message
    with running_ring(
        tiny_chat_model, 2, kv_cache_max_size=256, max_sequence_length=200, rank_memory_limit_mb=1
    ) as ring:
        failed = ring.wait_failed()
        assert failed.permanent and "RANK_MEMORY_LIMIT_MB" in failed.message


WATCHING_RANK = """
import json, os, sys
from distributed.ring import Ring
receive = Ring.receive
def recorded(self, specs):
    arrays = receive(self, specs)
    with open(os.environ["MLX_RING_RECORD"] + f".{self.rank}", "a") as record:
        record.write(json.dumps([[spec.dtype, a.tolist() if spec.dtype == "int32" else list(spec.shape)]
                                 for spec, a in zip(specs, arrays)]) + "\\n")
    return arrays
Ring.receive = recorded
from server.__main__ import main
main()
"""


def test_prompts_leave_rank_0_as_token_ids_over_mlx_distributed(
    tiny_chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLX_RING_RECORD", str(tmp_path / "received"))
    program = tmp_path / "watching_rank.py"
    program.write_text(WATCHING_RANK)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    with running_ring(tiny_chat_model, 3, program=str(program)) as ring:
        ring.wait_ready()
        prompt = list(range(30, 50))
        ring.submit("broadcast", prompt, 3)
        answer = ring.collect("broadcast")["broadcast"]
    for rank in (1, 2):  # every stage gets the ids: all but the last in the prefill, then one a step
        frames = [json.loads(line) for line in (tmp_path / f"received.{rank}").read_text().splitlines()][-4:]
        assert [frame[0] for frame in frames] == [
            ["int32", [ids]] for ids in (prompt[:-1], prompt[-1:], answer[:1], answer[1:2])
        ]
    results = [json.loads(line) for line in (tmp_path / "received.0").read_text().splitlines()]
    assert [frame for frame in results if frame][-3:] == [[["int32", [token]]] for token in answer]


def test_the_kv_keys_bound_what_the_ranks_allocate(tiny_chat_model: Path):
    with running_ring(tiny_chat_model, 2, kv_cache_max_size=512, max_sequence_length=256) as ring:
        ready = ring.wait_ready()
        assert (ready.kv_cache_tokens, ready.max_sequence_length) == (512, 256)
        limits = [info.kv_cache_bytes_limit for info in ready.ranks]
        names = [f"request-{index}" for index in range(16)]
        for name in names:
            ring.submit(name, list(range(3, 43)), 200)
        seen = [0, 0]
        running = ended = 0
        while ended < len(names):
            match ring.next():
                case Stats(ranks=ranks):
                    seen = [max(most, info.kv_cache_bytes) for most, info in zip(seen, ranks, strict=True)]
                case StepOutput(outputs=outputs, started=started):
                    running += len(started) - sum(output.finish_reason is not None for output in outputs)
                    ended += sum(output.finish_reason is not None for output in outputs)
                    assert running <= 2, "two requests of one block each fill the cache, the others wait"
        assert seen == limits
