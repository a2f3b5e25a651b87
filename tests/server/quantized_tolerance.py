"""Prints what KV_CACHE_BITS does to the embedded model's logits: `python -m tests.server.quantized_tolerance`.

Teacher-forced, so that one token that flips does not hide the rest: texts of several lengths, the last tokens one by
one. Ours run in two stages and in one batch, mlx-lm's QuantizedKVCache whole and each text alone; to see what the
difference of the two is worth, mlx-lm's also with the text in one go, and against its plain KVCache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distributed.blas import prefer_openblas

prefer_openblas()

import mlx.core as mx  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache  # noqa: E402

from distributed.model_files import prepare_model  # noqa: E402
from distributed.partition import LayerRange  # noqa: E402
from distributed.shard.hooks import decoder_layers  # noqa: E402
from distributed.shard.stage_model import StageModel  # noqa: E402
from server.quantization import quantized_make_cache  # noqa: E402
from server.quantized_cache import BatchQuantizedKVCache  # noqa: E402

MakeCache = Callable[[], list[Any]]
ROOT = Path(__file__).resolve().parents[2]
PROMPT_LENGTHS = (120, 37, 260, 5)
NUM_FORCED = 16  # tokens after each prompt, in a batch
CHUNK_TOKENS = 64


def in_one_go(model: Any, text: list[int], make_cache: MakeCache) -> mx.array:
    """Logits (NUM_FORCED, vocabulary) of the text's last tokens."""
    return _step([model], [text], [make_cache()])[0, -NUM_FORCED:]


def alone(model: Any, text: list[int], make_cache: MakeCache) -> mx.array:
    """The same, with the prompt in chunks and then token by token."""
    caches = [make_cache()]
    _read_prompt([model], text, caches)
    return mx.concatenate([_step([model], [[token]], caches)[0] for token in text[-NUM_FORCED:]])


def ours(stages: list[StageModel], texts: list[list[int]], bits: int) -> list[mx.array]:
    """The same for each text, from two stages, all texts in one batch once their prompts are read."""
    make_caches = [quantized_make_cache(stage, bits) for stage in stages]
    rows = [[make_cache() for make_cache in make_caches] for _ in texts]
    for text, caches in zip(texts, rows):
        _read_prompt(stages, text, caches)
    batch = [[BatchQuantizedKVCache.merge(row) for row in zip(*stage)] for stage in zip(*rows)]
    steps = [_step(stages, [[text[index]] for text in texts], batch) for index in range(-NUM_FORCED, 0)]
    return list(mx.concatenate(steps, axis=1))


def _read_prompt(stages: list[StageModel], text: list[int], caches: list[list[Any]]) -> None:
    prompt = text[:-NUM_FORCED]
    for start in range(0, len(prompt), CHUNK_TOKENS):
        _step(stages, [prompt[start : start + CHUNK_TOKENS]], caches)


def _step(stages: list[StageModel], ids: list[list[int]], caches: list[list[Any]]) -> mx.array:
    output: Any = None
    for stage, cache in zip(stages, caches, strict=True):
        output = stage(mx.array(ids), output, cache)
    mx.eval(output)
    return output


def _distances(a: list[mx.array], b: list[mx.array]) -> str:
    differences = mx.abs(mx.concatenate(a) - mx.concatenate(b))
    same = mx.mean(mx.concatenate(a).argmax(axis=-1) == mx.concatenate(b).argmax(axis=-1))
    return f"{differences.max().item():.1e} | {differences.mean().item():.1e} | {100 * same.item():.0f} %"  # type: ignore[operator]


def main() -> None:
    folder = str(prepare_model("builtin-f32", ROOT))
    model, tokenizer = load(folder)[:2]
    num_layers = len(decoder_layers(model))
    whole = StageModel(model, LayerRange(0, num_layers))
    halves = LayerRange(0, num_layers // 2), LayerRange(num_layers // 2, num_layers)
    stages = [StageModel(load(folder, lazy=True)[0], layer_range) for layer_range in halves]
    tokens = tokenizer.encode((ROOT / "docs" / "architecture.md").read_text())
    texts = [tokens[100 * row :][: length + NUM_FORCED] for row, length in enumerate(PROMPT_LENGTHS)]

    def each(run: Callable[..., mx.array], make: Callable[[], Any]) -> list[mx.array]:
        return [run(whole, text, lambda: [make() for _ in range(num_layers)]) for text in texts]

    plain = each(alone, KVCache)
    print("| compared | largest | mean | same best token |\n|---|---|---|---|")
    for bits in (8, 4):
        make = partial(QuantizedKVCache, 64, bits)
        mlx_lms = each(alone, make)
        for compared, a, b in [
            ("ours in a batch, mlx-lm's alone", ours(stages, texts, bits), mlx_lms),
            ("mlx-lm's in one go, mlx-lm's in chunks", each(in_one_go, make), mlx_lms),
            ("mlx-lm's plain cache, mlx-lm's", plain, mlx_lms),
        ]:
            print(f"| {bits} bits: {compared} | {_distances(a, b)} |", flush=True)


if __name__ == "__main__":
    main()
