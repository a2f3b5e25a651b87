"""Tiny random llama models written as folders of one or several weight files, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def tiny_llama(**changes: Any) -> tuple[llama.Model, dict[str, Any]]:
    """A model with random weights, and its config."""
    config = CONFIG | changes
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model, config


def write_folder(folder: Path, *, prefix: str = "model", **changes: Any) -> llama.Model:
    """Writes a folder of four weight files, one layer in each; embeddings in the first, norm and head in the last."""
    model, config = tiny_llama(**changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    count = config["num_hidden_layers"]
    files: dict[str, dict[str, mx.array]] = {}
    parameters: list[tuple[str, Any]] = tree_flatten(model.parameters())  # pyright: ignore[reportAssignmentType]
    for name, weight in parameters:
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else count - 1
        files.setdefault(f"{prefix}-{layer + 1:05}-of-{count:05}.safetensors", {})[name] = weight
    for name, weights in files.items():
        mx.save_safetensors(str(folder / name), weights)
    weight_map = {name: file for file, weights in files.items() for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))
