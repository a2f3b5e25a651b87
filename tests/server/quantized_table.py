"""Prints docs/models.md's table of what takes KV_CACHE_BITS: `python -m tests.server.quantized_table`. A minute.

Each architecture runs as a ring of two would run it: cut in two stages, two sequences in a batch, on our caches. The
measure is the model in one piece with each sequence alone, on mlx-lm's own QuantizedKVCache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache

from distributed.errors import ModelError
from distributed.partition import LayerRange
from distributed.shard.hooks import decoder_layers
from distributed.shard.stage_model import StageModel
from server.errors import CacheError
from server.quantization import quantized_make_cache
from tests.distributed.cut_runs import difference
from tests.distributed.tiny_models import runnable
from tests.server.wide_models import build_wide

PROMPTS = [[5, 42, 79, 27, 64], [12, 49, 86, 34, 71, 19, 56, 4, 41, 78, 26]]
STEPS = [[[1], [2]], [[3], [4]], [[5, 6, 7], [8, 9, 10]], [[11], [12]]]  # of both sequences, one of three tokens
BITS = (8, 4)


def stages_of(architecture: str, starts: Sequence[int]) -> list[StageModel]:
    """The model cut before each of the layers `starts`."""
    ends = [*starts[1:], len(decoder_layers(build_wide(architecture)))]
    return [StageModel(build_wide(architecture), LayerRange(*ends_of)) for ends_of in zip(starts, ends)]


def difference_from_mlx_lm(architecture: str, bits: int) -> float:
    """The largest difference of logits; their standard deviation is about 1.

    Raises:
        CacheError: the architecture does not take quantized caches.
    """
    try:
        stages = stages_of(architecture, [0, len(decoder_layers(build_wide(architecture))) // 2])
    except ModelError:  # refused on more than one rank
        stages = stages_of(architecture, [0])
    ours = [[quantized_make_cache(stage, bits)() for stage in stages] for _ in PROMPTS]
    whole = stages_of(architecture, [0])
    theirs = [[_of_mlx_lm(quantized_make_cache(whole[0], bits)())] for _ in PROMPTS]
    got = _logits(stages, ours, batched=stages[0].can_batch)
    return difference(_logits(whole, theirs, batched=False), got)


def _of_mlx_lm(caches: list[Any]) -> list[Any]:
    return [QuantizedKVCache(c.group_size, c.bits) if isinstance(c, QuantizedKVCache) else c for c in caches]


def _logits(stages: list[StageModel], rows: list[list[list[Any]]], *, batched: bool) -> list[mx.array]:
    """Of both prompts, and of every step, rows stacked. `rows`: for each sequence and stage, its caches."""
    logits = [_step(stages, [prompt], caches) for prompt, caches in zip(PROMPTS, rows)]
    batch = [[type(pair[0]).merge(list(pair)) for pair in zip(*stage)] for stage in zip(*rows)] if batched else None
    for ids in STEPS:
        if batch is not None:
            logits.append(_step(stages, ids, batch))
        else:
            logits.append(mx.concatenate([_step(stages, [row], caches) for row, caches in zip(ids, rows)]))
    return logits


def _step(stages: list[StageModel], ids: list[list[int]], caches: list[list[Any]]) -> mx.array:
    output: Any = None
    for stage, cache in zip(stages, caches, strict=True):
        output = stage(mx.array(ids), output, cache)
    mx.eval(output)
    return output


def main() -> None:
    rows: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(runnable(), key=str.lower):
        try:
            largest = max(difference_from_mlx_lm(name, bits) for bits in BITS)
            rows["yes, equal" if largest == 0 else f"yes, to {largest:.0e}"].append(name)
        except CacheError as error:
            reason = str(error).removesuffix("; leave KV_CACHE_BITS empty").split(": ")[1]
            rows[f"no: {reason}"].append(name)
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}\n\n| KV_CACHE_BITS | architectures |\n|---|---|")
    for result, names in sorted(rows.items(), reverse=True):
        print(f"| {result} | {', '.join(names)} |")


if __name__ == "__main__":
    main()
