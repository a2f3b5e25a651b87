"""The lap that times a stage's layers: it sees which part takes long, on every kind of model, and leaves no trace."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from distributed.partition import LayerRange
from distributed.shard.hooks import decoder_layers
from distributed.shard.measure import NUM_ROWS, measure_stage
from distributed.shard.stage_model import StageModel
from tests.distributed.tiny_models import build

SLOW_S = 0.05

# Plain, in batches of one only, mixture of experts, state space, keys shared with later layers, batch on another axis.
ARCHITECTURES = ["llama", "gemma2", "qwen3_moe", "mamba2", "gemma4_text", "gemma3n", "kimi_k3", "deepseek_v41"]


def draw(logits: mx.array) -> mx.array:
    return mx.argmax(logits[:, -1], axis=-1)


def slow_down(model: nn.Module, layer: int) -> None:
    """Make one layer take `SLOW_S` longer than the others."""
    module = decoder_layers(model)[layer]
    layer_class: Any = type(module)

    def slowly(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW_S)
        return layer_class.__call__(self, *args, **kwargs)

    module.__class__ = type("Slow", (layer_class,), {"__call__": slowly, "__module__": layer_class.__module__})


def test_each_layer_has_its_own_time():
    model = build("llama")
    slow_down(model, 2)
    times = measure_stage(StageModel(model, LayerRange(1, 4)), draw)
    assert (times.start, len(times.layers)) == (1, 3)
    assert times.layers[1] == pytest.approx(SLOW_S, rel=0.3)
    assert max(times.layers[0], times.layers[2], times.others) < SLOW_S / 2


def test_what_the_last_rank_does_with_the_logits_counts_besides_the_layers():
    seen: list[tuple[int, ...]] = []

    def slowly(logits: mx.array) -> mx.array:
        seen.append(logits.shape)
        time.sleep(SLOW_S)
        return draw(logits)

    times = measure_stage(StageModel(build("llama"), LayerRange(2, 4)), slowly)
    assert times.others == pytest.approx(SLOW_S, rel=0.3) and max(times.layers) < SLOW_S / 2
    assert set(seen) == {(NUM_ROWS, 1, 96)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_middle_and_last_stages_of_all_kinds_of_models_can_be_timed(architecture: str):
    num_layers = len(decoder_layers(build(architecture)))
    for start, end in ((0, 1), (1, num_layers - 1), (num_layers - 1, num_layers)):
        times = measure_stage(StageModel(build(architecture), LayerRange(start, end)), draw)
        assert (times.start, len(times.layers)) == (start, end - start)
        assert min(times.layers) > 0 and times.others > 0


def test_timing_leaves_no_trace_in_the_stage():
    stage = StageModel(build("qwen3"), LayerRange(0, 2))
    ids = mx.array([[3, 5, 7]])
    before = stage(ids, None, stage.make_cache())
    measure_stage(stage, draw)
    assert mx.array_equal(stage(ids, None, stage.make_cache()).output, before.output)
