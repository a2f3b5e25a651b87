"""What a model's config.json says about sizes, under the different names that architectures give to them.

Pure functions over the parsed file; nothing here reads a weight or imports mlx. `model_files` calls them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from distributed.errors import ModelError

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers")
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def load_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: it is missing, is no JSON object, has no model_type, or one that the installed mlx-lm lacks.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json: MODEL_REPO must name the folder of an MLX model.") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): copy or download the model again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} has no model_type: it is not the config of a model that mlx-lm can load.")
    known = supported_model_types()
    if "model_file" not in config and known and config["model_type"] not in known:
        raise ModelError(
            f"{path} says model_type {config['model_type']!r}, which the installed mlx-lm does not know: choose "
            "another MODEL_REPO, or a newer mlx-lm that has it."
        )
    return config


def config_hash(config: dict[str, Any]) -> str:
    """sha256 of the config in canonical form: equal on all ranks whatever the file's spacing or order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def num_layers(config: dict[str, Any]) -> int | None:
    """Decoder layers; None where the config does not say."""
    return _first_int(config, _LAYER_COUNTS)


def max_context(config: dict[str, Any]) -> int | None:
    """The context length the model was made for, in tokens; None where the config does not say."""
    return _first_int(config, _CONTEXTS)


def vocab_size(config: dict[str, Any]) -> int | None:
    return _first_int(config, ("vocab_size", "padded_vocab_size"))


def is_tied(config: dict[str, Any]) -> bool:
    """True if the config says that the head is the embeddings' matrix."""
    return bool(config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False)))


def kv_bytes_per_token_layer(config: dict[str, Any], *, value_bytes: int | None = None) -> int:
    """Bytes that one token takes in one layer's cache, averaged over the layers: an estimate, for planning.

    Multi-head latent attention keeps one compressed vector, layers without attention keep nothing per token, and
    sliding windows are counted as if they never slid. `value_bytes` is the size of one cached number.
    """
    text = text_config(config)
    if value_bytes is None:
        value_bytes = _DTYPE_BYTES.get(str(text.get("dtype") or text.get("torch_dtype")), 2)
    if rank := text.get("kv_lora_rank"):
        return (rank + text.get("qk_rope_head_dim", 0)) * value_bytes
    heads = text.get("num_attention_heads") or text.get("n_heads") or text.get("n_head") or 0
    hidden = text.get("hidden_size") or text.get("d_model") or text.get("n_embd") or 0
    if not isinstance(heads, int) or not heads:
        return 0  # a state-space model
    kv_heads = text.get("num_key_value_heads") or heads
    if isinstance(kv_heads, list):
        kv_heads = max(kv_heads)
    head_dim = text.get("head_dim") or hidden // heads
    per_attention_layer = 2 * kv_heads * head_dim * value_bytes
    return round(per_attention_layer * _share_of_attention(text))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: itself, or a nested one under the outer values."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(nested := config.get(name), dict):
            return {**config, **nested}
    return config


@cache
def supported_model_types() -> frozenset[str]:
    """Model types of the installed mlx-lm (none if there is none), read from its files: importing it loads mlx."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    package = Path(spec.submodule_search_locations[0])
    types = {file.stem for file in (package / "models").glob("*.py")}
    for node in ast.parse((package / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            types |= set(ast.literal_eval(node.value))
    return frozenset(types)


def _share_of_attention(text: dict[str, Any]) -> float:
    """Of a hybrid model's layers, the part that keeps keys and values."""
    if isinstance(kinds := text.get("layer_types"), list) and kinds:
        return sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds) / len(kinds)
    if isinstance(interval := text.get("full_attention_interval"), int) and interval > 0:
        return 1 / interval
    if isinstance(pattern := text.get("hybrid_override_pattern"), (str, list)) and len(pattern):
        return sum(kind == "*" for kind in pattern) / len(pattern)
    return 1.0


def _first_int(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    text = text_config(config)
    return next((text[name] for name in names if isinstance(text.get(name), int)), None)
