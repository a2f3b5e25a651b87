"""The three places settings come from, each read as it stands: the environment, .env and CONFIG_FILE.

A source becomes a `Layer`: values by field, and where each one was written, for the messages. Nothing here judges a
value (that is `Settings`' work) or decides who wins (`config.load`'s), and nothing but `config.load` calls it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dotenv.parser import Binding, parse_stream

from config import names
from config.errors import ConfigError
from config.settings import KEYS

ENVIRONMENT = "the environment"
REGISTRY = "models"  # the section of CONFIG_FILE that is the registry
_FILE_KEYS = {key: field for key, field in KEYS.items() if key != "CONFIG_FILE"}
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASS", "AUTH", "CRED")


@dataclass
class Layer:
    """What one source sets: raw values and their origins, both by field; `problems` are its unusable names."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def set(self, field_name: str, value: Any, origin: str) -> None:
        self.values[field_name] = value
        self.origins[field_name] = origin


def shown(key: str, value: Any) -> str:
    """`key=value` for a message; what may be a secret is not shown."""
    secret = key == "API_KEYS" if key in KEYS else any(word in key.upper() for word in _SECRET_WORDS)
    if value is None or secret:
        return f"{key}=***" if value else key
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def read_environment(environ: Mapping[str, str]) -> tuple[Layer, dict[str, str]]:
    """Our keys, and the names that are a slip of one of ours: name as found -> key that was probably meant."""
    layer, misses = Layer(), {}
    for name, value in environ.items():
        if name in KEYS:
            layer.set(KEYS[name], value, ENVIRONMENT)
        elif not names.is_foreign(name) and (meant := names.near_miss(name, KEYS)):
            misses[name] = meant
    return layer, misses


def read_dotenv(path: Path) -> tuple[Layer, dict[str, str]]:
    """Our keys, and the names of others (HF_TOKEN, proxies) with their values. No file is an empty one.

    Raises ConfigError for a file that cannot be read or a line that is no setting.
    """
    layer, foreign = Layer(), {}
    for binding, line in _bindings(path):
        name, value, origin = binding.key or "", binding.value, f"{path.name} line {line}"
        if binding.error or value is None:
            written = re.split(r"[\s=]", binding.original.string.strip())[0]  # not all of it: it may be a secret
            layer.problems.append(f"{written} ({origin}): must read KEY=value, with both quotes if the value has any")
        elif name in KEYS:
            layer.set(KEYS[name], value, origin)
        elif names.is_foreign(name):
            foreign[name] = value
        else:
            layer.problems.append(unknown_name(name, value, origin, KEYS))
    return layer, foreign


def _bindings(path: Path) -> Iterator[tuple[Binding, int]]:
    """The settings of a .env file with their line numbers (the parser's own count stops before blank lines)."""
    text = _read_text(path) if path.exists() else ""
    for binding in parse_stream(io.StringIO(text, newline="")):
        original = binding.original.string
        blank_lines = original[: len(original) - len(original.lstrip())].replace("\r\n", "\n").count("\n")
        if binding.key is not None or binding.error:
            yield binding, binding.original.line + blank_lines


def read_config_file(path: Path, given: str) -> tuple[Layer, dict[str, dict[str, Any]]]:
    """The general keys of the JSON file and its registry: short name -> the keys of that model, in upper case.

    `given` is how the user wrote the path, for the messages. Raises ConfigError for a file that is not a JSON object.
    """
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise ConfigError(f"{given}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f'{given}: must be a JSON object, {{"KEY": value, …}}')
    models = content.pop(REGISTRY, {})
    if isinstance(models, dict):
        models = _without_comments(models)
    if not isinstance(models, dict) or not all(isinstance(entry, dict) for entry in models.values()):
        raise ConfigError(f'{given}: "{REGISTRY}" must be an object of objects, {{"short name": {{"KEY": value, …}}}}')
    return keyed_layer(content, given, _FILE_KEYS), models


def keyed_layer(content: Mapping[str, Any], origin: str, known: Mapping[str, str]) -> Layer:
    """A layer of a JSON object's keys."""
    layer = Layer()
    for key, value in _without_comments(content).items():
        if key in known:
            layer.set(known[key], value, origin)
        else:
            layer.problems.append(unknown_name(key, value, origin, known))
    return layer


def _without_comments(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no comments, so keys that begin with an underscore are."""
    return {key: value for key, value in content.items() if not key.startswith("_")}


def unknown_name(name: str, value: Any, origin: str, known: Iterable[str]) -> str:
    """The message for a name nobody reads."""
    if name in KEYS:
        return f"{shown(name, value)} ({origin}): not a key for this place; set it in .env"
    if meant := names.near_miss(name, tuple(known)) or names.closest(name, tuple(known)):
        return f"{shown(name, value)} ({origin}): no such key here; did you mean {meant}?"
    return f"{shown(name, value)} ({origin}): no such key here; remove it (docs/configuration.md lists the keys)"


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); make it a file this user may read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
