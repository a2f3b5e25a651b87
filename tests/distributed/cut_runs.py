"""Runs a model in one piece and cut into stages, step by step alike, for the tests that compare the two."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from distributed.partition import LayerRange
from distributed.shard.hooks import decoder_layers
from distributed.shard.message import StageMessage, pack_message, unpack_message
from distributed.shard.stage_model import StageModel
from tests.distributed.tiny_models import build


class WholeModel:
    """The model as mlx-lm runs it."""

    def __init__(self, architecture: str):
        self.model: Any = build(architecture)
        self.num_layers = len(self.model.layers)

    def make_caches(self) -> list[list[Any]]:
        return [make_prompt_cache(self.model)]

    def step(self, token_ids: mx.array, caches: list[list[Any]]) -> mx.array:
        logits = self.model(token_ids, cache=caches[0])
        mx.eval(logits, [cache.state for cache in caches[0]])
        return logits


class CutModel:
    """The same model as stages, each on its own copy of the weights; messages travel packed, as between ranks."""

    def __init__(self, architecture: str, starts: Sequence[int]):
        """`starts`: the first layer of each stage."""
        ends = [*starts[1:], len(decoder_layers(build(architecture)))]
        self.stages = [StageModel(build(architecture), LayerRange(*ends_of)) for ends_of in zip(starts, ends)]

    def make_caches(self) -> list[list[Any]]:
        return [stage.make_cache() for stage in self.stages]

    def step(self, token_ids: mx.array, caches: list[list[Any]]) -> mx.array:
        message: Any = None
        for stage, cache in zip(self.stages, caches):
            message = stage(token_ids, message, cache)
            if isinstance(message, StageMessage):
                arrays, structure = pack_message(message)
                mx.eval(arrays, [c.state for c in cache])
                message = unpack_message(json.loads(json.dumps(structure)), [mx.array(array) for array in arrays])
        mx.eval(message, [c.state for c in caches[-1]])
        return message


def cuts(num_layers: int) -> dict[str, list[int]]:
    """The ways to cut that tests try: 2 and 3 stages, and one layer a stage."""
    even = {f"P={p}": [num_layers * stage // p for stage in range(p)] for p in (2, 3)}
    return {**even, "a layer a stage": list(range(num_layers))}


def one_sequence(model: WholeModel | CutModel) -> list[mx.array]:
    """Logits of a prefill in two chunks, three decode steps, then a chunk of three tokens, and one decode step."""
    caches = model.make_caches()
    ids = (mx.arange(20) * 37 + 5) % 89
    bounds = [0, 6, 11, 12, 13, 14, 17, 18]
    return [model.step(ids[None, a:b], caches) for a, b in itertools.pairwise(bounds)]


def batched(model: WholeModel | CutModel) -> list[mx.array]:
    """Logits while sequences of different lengths run as one batch, one joins, one leaves, one goes on alone."""
    alone = [model.make_caches() for _ in range(3)]
    ids = (mx.arange(60) * 31 + 3) % 89
    logits = [model.step(ids[None, :n], caches) for n, caches in zip((5, 11, 3), alone)]
    batch = [[type(c[0]).merge(list(c)) for c in zip(*stage)] for stage in zip(*alone[:2])]
    logits += [model.step(ids[20:22, None], batch), model.step(ids[22:28].reshape(2, 3), batch)]
    joining = [[type(c).merge([c]) for c in stage] for stage in alone[2]]
    for stage, others in zip(batch, joining):
        for cache, other in zip(stage, others):
            cache.extend(other)
    logits += [model.step(ids[i : i + 3, None], batch) for i in (30, 33)]
    logits.append(model.step(ids[36:45].reshape(3, 3), batch))
    for stage in batch:
        for cache in stage:
            cache.filter(mx.array([0, 2]))
    logits += [model.step(ids[45:47, None], batch), model.step(ids[47:53].reshape(2, 3), batch)]
    last = [[cache.extract(1) for cache in stage] for stage in batch]
    return [*logits, model.step(ids[None, 53:56], last), model.step(ids[None, 56:57], last)]


def alone_and_batched(model: WholeModel) -> tuple[list[mx.array], list[mx.array]]:
    """Logits of two sequences of different lengths over 12 decode steps, each alone and both in one batch."""
    alone = [_prefilled(model, length) for length in (5, 11)]
    rows = [[model.step(mx.array([[step + row]]), caches) for step in range(12)] for row, caches in enumerate(alone)]
    together = zip(*[_prefilled(model, length)[0] for length in (5, 11)])
    batch = [[type(c[0]).merge(list(c)) for c in together]]
    steps = [model.step(mx.array([[step], [step + 1]]), batch) for step in range(12)]
    return [mx.concatenate(list(logits)) for logits in zip(*rows)], steps


def _prefilled(model: WholeModel, length: int) -> list[list[Any]]:
    caches = model.make_caches()
    model.step(((mx.arange(length) * 13 + 2) % 89)[None], caches)
    return caches


@dataclass
class Parity:
    """How an architecture's stages compare with the whole model.

    `differences`: for each cut, the largest difference of logits, alone and (where it can be batched) in batches.
    `batched`: the largest difference between a sequence in a batch and alone, both by the whole model; None where it
    cannot be batched. It is rounding: the batch adds up in another order. The logits' standard deviation is about 1.
    """

    differences: dict[str, float]
    batched: float | None


def parity(architecture: str) -> Parity:
    """Runs the architecture whole and cut in every way.

    Raises:
        ModelError: it cannot be cut.
    """
    whole = WholeModel(architecture)
    can_batch = StageModel(build(architecture), LayerRange(0, whole.num_layers)).can_batch
    runs = [one_sequence, batched] if can_batch else [one_sequence]
    expected = [run(whole) for run in runs]
    differences = {
        cut: max(difference(logits, run(CutModel(architecture, starts))) for run, logits in zip(runs, expected))
        for cut, starts in cuts(whole.num_layers).items()
    }
    if not can_batch:
        return Parity(differences, None)
    alone, together = alone_and_batched(whole)
    return Parity(differences, difference(alone, together))


def difference(expected: list[mx.array], got: list[mx.array]) -> float:
    """The largest difference between logits, over all steps: 0 where they are bitwise equal; nan where one is nan."""
    assert [a.shape for a in expected] == [b.shape for b in got]
    return max(float(mx.where(a == b, 0, mx.abs(a - b)).max().item()) for a, b in zip(expected, got))  # type: ignore
