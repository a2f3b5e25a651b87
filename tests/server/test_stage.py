"""Scheduler and stages of a whole ring in one process: every kind of cache through joins, leaves and chunks.

Frames and messages are packed and unpacked as between ranks; only threads and sockets are missing (test_ring.py has
those). What comes out must be what the model says to each prompt alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from distributed.partition import LayerRange
from distributed.shard.hooks import decoder_layers
from distributed.shard.stage_model import StageModel
from server.frame import Admit, ResultHeader, StepHeader, decode_header, encode_header
from server.kv_budget import MIB, KVBudget
from server.protocol import SamplingParams, Submit
from server.scheduler import Scheduler
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

    def __init__(self, architecture: str, size: int) -> None:
        num_layers = len(decoder_layers(build(architecture)))
        bounds = [num_layers * rank // size for rank in range(size + 1)]
        ranges = [LayerRange(start, end) for start, end in itertools.pairwise(bounds)]
        self.stages = [Stage(StageModel(build(architecture), layer_range)) for layer_range in ranges]
        self.budget = KVBudget([stage.cache_cost for stage in self.stages], 64 * MIB)

    def run(self, header: StepHeader, arrays: list[mx.array]) -> list[int]:
        for stage in self.stages:
            outgoing, arrays = stage.run(header, arrays)
            outgoing = decode_header(encode_header(outgoing))
            if isinstance(outgoing, ResultHeader):
                return arrays[0].tolist() if arrays else []  # type: ignore[return-value]
            header = outgoing
        raise AssertionError("the last stage gave no result")


def serve(ring: Ring, requests: list[Submit], *, every: int = 2) -> dict[str, list[int]]:
    """Run `requests`, a new one every few steps, so that they join and leave at different times."""
    scheduler = Scheduler(ring.budget, max_sequence_length=512, max_running=8, prefill_chunk_tokens=16)
    waiting = list(requests)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    steps = 0
    while True:
        if waiting and steps % every == 0:
            scheduler.add(waiting.pop(0))
        step = scheduler.schedule()
        steps += 1
        if step is None:
            if not waiting:
                break
            continue
        ids = [mx.array(step.token_ids, dtype=mx.int32)] if step.frame.rows else []
        for output in scheduler.complete(step.frame.frame_id, ring.run(StepHeader(step.frame), ids)):
            outputs[output.request_id] += output.token_ids
    assert all(stage.caches.num_bytes == 0 for stage in ring.stages)
    return outputs


def requests(**options: Any) -> list[Submit]:
    options = {"sampling": SamplingParams(temperature=0), "max_tokens_given": True, "stop_token_ids": []} | options
    return [Submit(name, prompt, max_tokens=MAX_TOKENS[name], **options) for name, prompt in PROMPTS.items()]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_cache_gives_each_request_what_it_gets_alone(architecture: str, size: int):
    expected = {name: alone(architecture, PROMPTS[name], MAX_TOKENS[name]) for name in PROMPTS}
    assert serve(Ring(architecture, size), requests()) == expected


def test_a_preempted_request_says_what_it_would_have_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.scheduler.GROWTH_TOKENS", 8)
    ring = Ring("llama", 2)
    ring.budget = KVBudget([stage.cache_cost for stage in ring.stages], 64 * MIB, max_tokens=768)
    monkeypatch.setitem(MAX_TOKENS, "b", 240)
    monkeypatch.setitem(MAX_TOKENS, "d", 260)
    admitted: list[int] = []
    original = Stage.run

    def watched(self: Stage, header: StepHeader, arrays: Any) -> Any:
        admitted.extend(op.sequence_id for op in header.frame.operations if isinstance(op, Admit))
        return original(self, header, arrays)

    monkeypatch.setattr(Stage, "run", watched)
    expected = {name: alone("llama", PROMPTS[name], MAX_TOKENS[name]) for name in PROMPTS}
    assert serve(ring, requests(max_tokens_given=False)) == expected
    assert len(admitted) > 2 * len(PROMPTS), "somebody was admitted twice"
