"""The registry of models: short names for MODEL_REPO, each with the settings that suit that model.

It is the `models` section of CONFIG_FILE. An entry's settings lose against the environment and .env and win over the
file's general keys. Only `config.load` calls it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from config.errors import ConfigError
from config.settings import KEYS
from config.sources import REGISTRY, Layer, keyed_layer

ENTRY_FIELDS = (
    *("model_repo", "default_temperature", "default_top_p", "default_max_tokens", "kv_cache_max_size"),
    *("kv_cache_reserved_memory_mb", "max_sequence_length", "trust_remote_code", "layer_split"),
)
_ENTRY_KEYS = {key: field for key, field in KEYS.items() if field in ENTRY_FIELDS}


def entry_layers(models: Mapping[str, Mapping[str, Any]], given: str) -> dict[str, Layer]:
    """Every entry as a layer: its keys, and its short name as the model's name."""
    layers = {}
    for short_name, entry in models.items():
        origin = f'{given}, "{REGISTRY}", "{short_name}"'
        layer = keyed_layer(entry, origin, _ENTRY_KEYS)
        layer.set("model_name", short_name, origin)
        if not isinstance(entry.get("MODEL_REPO"), str):
            layer.problems.append(f'{origin}: needs "MODEL_REPO", the repository, folder or "builtin" it stands for')
        layers[short_name] = layer
    return layers


def check_near_miss(model_repo: str, origin: str, short_names: Iterable[str], root: Path) -> None:
    """Raises ConfigError where MODEL_REPO is no folder and no repository, and looks like one of the short names."""
    is_something_else = "/" in model_repo or model_repo.startswith("builtin")
    if is_something_else or (root / model_repo).exists() or (root / "models" / model_repo).exists():
        return
    if close := difflib.get_close_matches(model_repo, (*short_names, "builtin"), n=1, cutoff=0.8):
        raise ConfigError(
            f"MODEL_REPO={model_repo} ({origin}): no folder and no name of the registry; did you mean {close[0]}?"
        )
