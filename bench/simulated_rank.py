"""A rank whose layers are a timed sleep: `python -m server` with the loaded stage replaced, everything else real.

Engine, scheduler, cache store, sampler, ring and their threads run as they do in production. A rank that sleeps is on
no core, so a ring of eight fits on a machine with two. `bench.scaling` starts it, under mlx.launch, as

    python -m bench.simulated_rank --layer-ms FIXED --layer-row-ms PER_ROW --hidden-size N --instance ID --socket PATH
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from typing import Any

import mlx.core as mx

from bench.pipeline_model import Cost
from distributed.model_files import ModelInfo
from distributed.partition import LayerRange
from distributed.shard.message import StageMessage
from server import __main__ as rank

_HEAD_DIM = 64  # of the small cache


class SimulatedStage:
    """In the place of `distributed.shard.stage_model.StageModel`, with one small real cache.

    Args:
        layer: what one layer takes for a step of so many rows, or of so many tokens of a prompt.
        hidden_size: of the bfloat16 hidden states that are passed on.
    """

    can_batch = True

    def __init__(self, info: ModelInfo, layer_range: LayerRange, layer: Cost, hidden_size: int) -> None:
        self.layer_range = layer_range
        self.num_layers = info.num_layers
        self.is_first = layer_range.start == 0
        self.is_last = layer_range.end == info.num_layers
        self._layer, self._vocab_size, self._hidden_size = layer, info.vocab_size, hidden_size
        self._late_s = 0.0

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import KVCache  # heavy: a rank joins the ring before it imports this

        return [KVCache()]

    def dry_run(self, cache: list[Any] | None = None) -> tuple[Any, list[Any]]:
        cache = self.make_cache() if cache is None else cache
        return self._output(mx.zeros((1, 1), mx.int32), cache), cache

    def __call__(self, token_ids: mx.array, message: StageMessage | None, cache: list[Any]) -> Any:
        """Sleeps now, not when its result is evaluated: the stage's clock counts both."""
        num_layers = self.layer_range.end - self.layer_range.start
        self._sleep(num_layers * self._layer.seconds(token_ids.size))
        return self._output(token_ids, cache)

    def _sleep(self, seconds: float) -> None:
        """A sleep ends late, on a busy machine by more than a millisecond; that is taken off the next one."""
        began = time.perf_counter()
        seconds -= self._late_s
        time.sleep(max(0.0, seconds))
        self._late_s = time.perf_counter() - began - seconds

    def _output(self, token_ids: mx.array, cache: list[Any]) -> Any:
        """Logits on the last stage, else hidden states: zeros, and zeros go into the cache."""
        rows, tokens = token_ids.shape
        cache[0].update_and_fetch(*(mx.zeros((rows, 1, tokens, _HEAD_DIM)) for _ in "kv"))
        if self.is_last:
            return mx.zeros((rows, tokens, self._vocab_size))
        return StageMessage(mx.zeros((rows, tokens, self._hidden_size), mx.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer-ms", type=float, required=True)
    parser.add_argument("--layer-row-ms", type=float, required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    arguments, sys.argv[1:] = parser.parse_known_args()
    layer = Cost(arguments.layer_ms / 1000, arguments.layer_row_ms / 1000)

    def load_stage(info: ModelInfo, layer_range: LayerRange, **_: Any) -> SimulatedStage:
        return SimulatedStage(info, layer_range, layer, arguments.hidden_size)

    # The rank imports this module when it has joined the ring; it finds ours in its place.
    loading = types.ModuleType("distributed.shard.load")
    vars(loading)["load_stage"] = load_stage
    sys.modules[loading.__name__] = loading
    rank.main()


if __name__ == "__main__":
    main()
