"""Scheduler and stages of a whole ring in one process: every kind of cache through joins, leaves and chunks.

Frames and messages are packed and unpacked as between ranks; only threads and sockets are missing (test_ring.py has
those). What comes out must be what the model says to each prompt alone.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from distributed.partition import LayerRange
from distributed.shard.hooks import decoder_layers
from distributed.shard.stage_model import StageModel
from server.errors import DisagreementError
from server.frame import Admit, Frame, Join, Keep, Leave, ResultHeader, Row, StepHeader, decode_header, encode_header
from server.kv_budget import MIB, KVBudget
from server.protocol import SamplingParams, Submit, TokenLogprobs
from server.scheduler import Scheduler, SchedulerOptions
from server.stage import Stage
from tests.distributed.tiny_models import build

ARCHITECTURES = ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2", "qwen3_next", "llama4_text", "gemma2"]
PROMPTS = {"a": [5, 6, 7], "b": list(range(1, 31)), "c": [9], "d": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]}
MAX_TOKENS = {"a": 12, "b": 5, "c": 9, "d": 7}


def alone(architecture: str, prompt: list[int], max_tokens: int) -> list[int]:
    model: Any = build(architecture)
    cache = make_prompt_cache(model)
    tokens: list[int] = []
    ids: Any = prompt
    for _ in range(max_tokens):
        logits = model(mx.array([ids]), cache=cache)
        ids = mx.argmax(logits[:, -1], axis=-1).tolist()
        tokens += ids
    return tokens


class Ring:
    """The stages of `size` ranks, one after the other."""

    def __init__(self, architecture: str, size: int, *, build: Any = build, kv_cache_bits: int | None = None) -> None:
        num_layers = len(decoder_layers(build(architecture)))
        bounds = [num_layers * rank // size for rank in range(size + 1)]
        ranges = [LayerRange(start, end) for start, end in itertools.pairwise(bounds)]
        self.stages = [Stage(StageModel(build(architecture), layers), kv_cache_bits) for layers in ranges]
        self.budget = KVBudget([stage.cache_cost for stage in self.stages], 64 * MIB)

    def run(self, frame: Frame, token_ids: list[list[int]] | None = None) -> tuple[ResultHeader, list[list[Any]]]:
        """One frame through all stages: the result's header, and its tensors as lists."""
        width = max(map(len, token_ids or [[]]))
        padded = [row + [0] * (width - len(row)) for row in token_ids or []]
        header, arrays = StepHeader(frame), [mx.array(padded, dtype=mx.int32)] if padded else []
        for stage in self.stages:
            outgoing, arrays = stage.run(header, arrays)
            outgoing = decode_header(encode_header(outgoing))
            if isinstance(outgoing, ResultHeader):
                return outgoing, [array.tolist() for array in arrays]  # type: ignore[misc]
            header = outgoing
        raise AssertionError("the last stage gave no result")


class Server:
    """A scheduler on a ring, with a few frames in flight. `outputs`: what each request got so far."""

    def __init__(self, ring: Ring, *, num_groups: int | None = None, prefix_cache: bool = False) -> None:
        self.ring = ring
        options = SchedulerOptions(
            max_sequence_length=512,
            max_running=8,
            num_stages=len(ring.stages),
            chunk_tokens=16,
            num_groups=num_groups,
            prefix_cache=prefix_cache,
        )
        self.scheduler = Scheduler(ring.budget, options)
        self.outputs: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, dict[int, TokenLogprobs]] = {}  # by the token's index in the prompt
        self.frames: list[Frame] = []
        self._in_flight: deque[tuple[ResultHeader, list[list[Any]]]] = deque()

    def serve(self, requests: list[Submit], *, every: int = 2) -> dict[str, list[int]]:
        """Run `requests`, a new one every few steps, so that they join and leave at different times."""
        waiting = list(requests)
        self.outputs |= {request.request_id: [] for request in requests}
        for step in itertools.count():
            if waiting and step % every == 0:
                self.scheduler.add(waiting.pop(0))
            launched = self._launch()
            if not launched and self._in_flight:
                self._complete()
            elif not launched and not waiting:
                break
        return self.outputs

    def _launch(self) -> bool:
        if (step := self.scheduler.schedule()) is None:
            return False
        self.frames.append(step.frame)
        self._in_flight.append(self.ring.run(step.frame, step.token_ids))
        return True

    def _complete(self) -> None:
        result, tensors = self._in_flight.popleft()
        for output in self.scheduler.complete(result, tensors, sum(result.stage_seconds)):
            self.outputs[output.request_id] += output.token_ids
            self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
            of_prompt = self.prompt_logprobs.setdefault(output.request_id, {})
            of_prompt |= dict(enumerate(output.prompt_logprobs, output.prompt_logprobs_start))

    def operations(self, kind: type) -> list[Any]:
        return [operation for frame in self.frames for operation in frame.operations if isinstance(operation, kind)]


def requests(**options: Any) -> list[Submit]:
    options = {"sampling": SamplingParams(temperature=0), "max_tokens_given": True, "stop_token_ids": []} | options
    return [Submit(name, prompt, max_tokens=MAX_TOKENS[name], **options) for name, prompt in PROMPTS.items()]


def expected(architecture: str) -> dict[str, list[int]]:
    return {name: alone(architecture, PROMPTS[name], MAX_TOKENS[name]) for name in PROMPTS}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_cache_gives_each_request_what_it_gets_alone(architecture: str, size: int):
    ring = Ring(architecture, size)
    assert Server(ring, num_groups=size).serve(requests()) == expected(architecture)
    assert all(stage.caches.num_bytes == 0 for stage in ring.stages)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_turn_starts_from_the_first_and_says_what_it_says_alone(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    for module in ("server.prefix_cache", "server.admission"):
        monkeypatch.setattr(f"{module}.MIN_TOKENS", 4)
    server = Server(Ring(architecture, 2), prefix_cache=True)
    first_turns = server.serve(requests())
    assert first_turns == expected(architecture)
    monkeypatch.setattr("tests.server.test_stage.PROMPTS", {n: PROMPTS[n] + first_turns[n] + [7, 8] for n in PROMPTS})
    assert server.serve(requests()) == expected(architecture)
    num_cached = {admit.num_prompt_tokens: admit.num_cached_tokens for admit in server.operations(Admit)}
    for name, turn in first_turns.items():
        assert num_cached[len(PROMPTS[name])] >= len(PROMPTS[name]) - 2 - len(turn), "the first prompt and more"
    assert all(stage.caches.num_bytes == stage.caches.prefix_bytes > 0 for stage in server.ring.stages)


def test_a_preempted_request_says_what_it_would_have_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.admission.GROWTH_TOKENS", 8)
    ring = Ring("llama", 2)
    ring.budget = KVBudget([stage.cache_cost for stage in ring.stages], 64 * MIB, max_tokens=768)
    monkeypatch.setitem(MAX_TOKENS, "b", 280)
    monkeypatch.setitem(MAX_TOKENS, "d", 270)
    server = Server(ring)
    assert server.serve(requests(max_tokens_given=False)) == expected("llama")
    assert len(server.operations(Admit)) > len(PROMPTS), "somebody was admitted twice"


GREEDY = SamplingParams(temperature=0)
PENALIZED = SamplingParams(temperature=0, repetition_penalty=5.0, frequency_penalty=1.0)


def first_tokens(ring: Ring, frames: list[tuple[Frame, list[list[int]]]]) -> list[int]:
    """What the last of `frames` samples."""
    return [ring.run(frame, token_ids)[1] for frame, token_ids in frames][-1][0]


@pytest.mark.parametrize("sampling", [GREEDY, PENALIZED])
def test_prompts_in_one_pack_give_what_they_give_one_by_one(sampling: SamplingParams):
    """Penalties see that the padding, token 0, is not taken for part of a prompt."""
    prompts = [[5, 6, 7], list(range(1, 21)), [9]]
    admit = [Admit(i, len(prompt) + 1, sampling) for i, prompt in enumerate(prompts)]
    pack = Frame(0, [*admit], [Row(i, len(prompt), len(prompt)) for i, prompt in enumerate(prompts)])
    one_by_one = [Frame(0, [admit[i]], [row]) for i, row in enumerate(pack.rows)]
    last = Frame(1, [Join(0, [0, 1, 2])], [Row(i, len(prompt) + 1) for i, prompt in enumerate(prompts)], 0)
    last_ids = [[3], [4], [5]]
    single = [(frame, [prompt]) for frame, prompt in zip(one_by_one, prompts, strict=True)]
    together = first_tokens(Ring("llama4_text", 2), [(pack, prompts), (last, last_ids)])
    assert together == first_tokens(Ring("llama4_text", 2), [*single, (last, last_ids)])


def test_penalties_count_the_tokens_of_a_kept_prefix():
    prompt = [5, 6, 7, 8]
    whole = [
        (Frame(0, [Admit(0, 4, PENALIZED)], [Row(0, 3, 3)]), [prompt[:3]]),
        (Frame(1, [Keep(9, 0, 3), Join(0, [0])], [Row(0, 4)], 0), [[prompt[3]]]),
    ]
    cached = [
        (Frame(2, [Admit(1, 4, PENALIZED, 9, 3, prompt[:3]), Join(1, [1])], [Row(1, 4)], 1), [[prompt[3]]]),
    ]
    ring = Ring("llama", 2)
    sampler: Any = ring.stages[-1]._sampler
    assert first_tokens(ring, whole) == first_tokens(ring, cached)
    of_whole, of_cached = sampler._requests[0], sampler._requests[1]
    assert (of_whole.is_seen == of_cached.is_seen).all() and of_cached.is_seen.sum() == 4
    assert of_whole.num_seen == of_cached.num_seen == 4


def test_the_sampler_forgets_whoever_leaves_with_or_without_an_entry():
    ring = Ring("llama", 2)
    sampler: Any = ring.stages[-1]._sampler
    rows = [Row(0, 3, 3), Row(1, 3, 3)]
    for row in rows:
        ring.run(Frame(row.sequence_id, [Admit(row.sequence_id, 4, PENALIZED)], [row]), [[5, 6, 7]])
    assert set(sampler._requests) == {0, 1}
    ring.run(Frame(2, [Keep(9, 0, 3, leaves=True), Leave([1])]))
    assert not sampler._requests


def test_every_stage_adds_what_the_rows_took():
    ring = Ring("llama", 3)
    started = time.perf_counter()
    seconds = ring.run(Frame(0, [Admit(0, 4, GREEDY)], [Row(0, 3, 3)]), [[5, 6, 7]])[0].stage_seconds
    assert len(seconds) == 3 and all(s > 0 for s in seconds) and sum(seconds) < time.perf_counter() - started
    seconds = ring.run(Frame(1, [Leave([0])]))[0].stage_seconds
    assert len(seconds) == 3 and sum(seconds) < 0.01


def test_token_ids_that_do_not_fit_their_rows_are_refused():
    ring = Ring("llama", 1)
    with pytest.raises(DisagreementError, match=r"token ids \(1, 3\) for rows \(1, 2\)"):
        ring.run(Frame(0, [Admit(0, 4, GREEDY)], [Row(0, 2, 2)]), [[5, 6, 7]])


def test_a_stage_says_which_cache_switches_the_prefix_cache_off(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        assert Stage(whole("llama")).cache_cost.can_keep
        assert not caplog.messages
        assert not Stage(whole("deepseek_v41")).cache_cost.can_keep
    assert caplog.messages == ["the prefix cache is off: LayerCache cannot be copied"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_cache_that_grows_by_whole_groups_of_tokens_costs_what_it_holds(size: int):
    """One token does not show it: deepseek_v41 keeps one compressed key for every two."""
    ring = Ring("deepseek_v41", size)
    ring.run(Frame(0, [Admit(0, 900, GREEDY)]))
    length = 0
    for num_tokens in (97, 158, 1, 256, 300):
        length += num_tokens
        ring.run(Frame(0, [], [Row(0, length, num_tokens)]), [[5] * num_tokens])
        for stage in ring.stages:
            held, counted = stage.caches.num_bytes, stage.cache_cost.row_bytes(length)
            assert held <= counted <= 1.1 * held, length


@pytest.mark.parametrize("chunk", [7, 600])
def test_chunks_of_attention_hold_no_more_than_they_cost(chunk: int):
    """mlx-lm cuts them at each step, wherever that is, and grows them again by a block."""
    ring = Ring("llama4", 1)
    cost = ring.stages[0].cache_cost
    ring.run(Frame(0, [Admit(0, 900, GREEDY)]))
    steps = [(length, chunk) for length in range(chunk, 650, chunk)]
    steps += [(steps[-1][0] + 1 + step, 1) for step in range(300)]
    for length, num_tokens in steps:
        ring.run(Frame(0, [], [Row(0, length, num_tokens)]), [[5] * num_tokens])
        assert ring.stages[0].caches.num_bytes <= cost.row_bytes(-(-length // 256) * 256), length


def whole(architecture: str) -> StageModel:
    model = build(architecture)
    return StageModel(model, LayerRange(0, len(decoder_layers(model))))
