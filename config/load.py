"""`load_config`: puts the sources together and says what is wrong with them, all of it in one go.

The order is: environment, .env, the registry's entry of the chosen model, CONFIG_FILE's general keys, the defaults.
It is the one place that reads the environment; it changes nothing, and the entry points of the api and the command line
call it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import InitSettingsSource

from config.combinations import Conflict, conflicts
from config.errors import ConfigError
from config.registry import check_near_miss, entry_layers
from config.settings import KEYS, Settings
from config.sources import ENVIRONMENT, Layer, read_config_file, read_dotenv, read_environment, shown
from config.values import Expects

_DEFAULTS = "default"


def load_config(root: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of the project in `root` (default: the folder above this package) under `environ` (default: ours).

    Raises ConfigError; its text names every key that cannot be used, its value, where it was set, and what to change.
    """
    root = (root or Path(__file__).parent.parent).resolve()
    environ = os.environ if environ is None else environ
    layers, misses, foreign = _read_layers(root, environ)
    problems = [problem for layer in layers for problem in layer.problems]
    problems += _unanswered(misses, environ, layers)
    passthrough = {name: environ.get(name, value) for name, value in foreign.items()}
    found = Layer({"project_root": root, "passthrough_env": passthrough})
    try:
        settings = _merged(found, *layers)
        problems += [_together(conflict, layers) for conflict in conflicts(settings)]
    except ValidationError as error:
        # A default that was not made (MODEL_NAME's, from MODEL_REPO) is a consequence of another error.
        refused = (detail for detail in error.errors() if detail["type"] != "default_factory_not_called")
        problems += [_problem(detail, layers) for detail in refused]
    except ConfigError as error:
        problems.append(f"{_where('hostfile', layers)}: {error}")
    if problems:
        raise ConfigError(*dict.fromkeys(problems)) from None
    return settings


def with_origins(message: str, root: Path, environ: Mapping[str, str] | None = None) -> str:
    """`message`, and in a line after it where the keys that it names were set, as far as it does not say so itself.

    For what is found only once the model, the machines or the ports are known: the settings do not say where they are
    from.
    """
    try:
        layers, _, _ = _read_layers(root.resolve(), os.environ if environ is None else environ)
    except ConfigError:
        return message
    named = [word for word in dict.fromkeys(re.findall(r"[A-Z_]+", message)) if word in KEYS]
    origins = {
        key: next((layer.origins[KEYS[key]] for layer in layers if KEYS[key] in layer.values), "") for key in named
    }
    told = [f"{key} in {origin}" for key, origin in origins.items() if origin and f"({origin})" not in message]
    return f"{message}\n(set: {', '.join(told)})" if told else message


def export_passthrough(settings: Settings, environ: MutableMapping[str, str] = os.environ) -> None:
    """Puts the names of others that .env sets (HF_TOKEN, proxies) into the environment of this process.

    Entry points call it before they import a library that reads such names (huggingface_hub does so once, at import).
    """
    for name, value in settings.passthrough_env.items():
        environ.setdefault(name, value)


def _merged(*layers: Layer) -> Settings:
    """The settings, each from the first layer that has it; pydantic-settings merges. Raises ValidationError."""
    sources = tuple(InitSettingsSource(Settings, layer.values) for layer in layers)
    return Settings(_build_sources=(sources, {}))  # pyright: ignore[reportCallIssue]  # BaseModel's typing hides it


def _read_layers(root: Path, environ: Mapping[str, str]) -> tuple[list[Layer], dict[str, str], dict[str, str]]:
    """All sources, the winning one first; near misses of the environment; names of others in .env. ConfigError."""
    environment, misses = read_environment(environ)
    dotenv, foreign = read_dotenv(root / ".env")
    return [environment, dotenv, *_file_layers(root, environment, dotenv)], misses, foreign


def _file_layers(root: Path, *explicit: Layer) -> list[Layer]:
    """The layers CONFIG_FILE gives: the chosen model (if MODEL_REPO is a short name), its entry, the general keys."""
    given, origin = _first("config_file", explicit)
    path = root / os.path.expanduser(given)
    if given and not path.is_file():
        raise ConfigError(f"CONFIG_FILE={given} ({origin}): there is no such file; correct the path or remove the key")
    general, models = read_config_file(path, given) if given else (Layer(), {})
    entries = entry_layers(models, given)
    general.problems += [problem for entry in entries.values() for problem in entry.problems]
    chosen, origin = _first("model_repo", (*explicit, general))
    if chosen in entries:
        for layer in (*explicit, general):  # the entry says which repository the short name stands for
            layer.values.pop("model_repo", None)
            if not layer.values.get("model_name"):  # `MODEL_NAME=` stands for the short name too
                layer.values.pop("model_name", None)
        return [entries[chosen], general]
    check_near_miss(chosen, origin, entries, root)
    return [general]


def _first(field: str, layers: Sequence[Layer]) -> tuple[str, str]:
    """The value that wins and its origin."""
    for layer in layers:
        if field in layer.values:
            return str(layer.values[field] or "").strip(), layer.origins[field]
    return "", _DEFAULTS


def _unanswered(misses: Mapping[str, str], environ: Mapping[str, str], layers: Sequence[Layer]) -> list[str]:
    """Near misses in the environment whose key is set nowhere.

    A variable that only looks like ours must not stop another program's user for ever: setting the key settles it.
    """
    return [
        f"{shown(name, environ[name])} ({ENVIRONMENT}): no such key; did you mean {meant}? "
        f"If another program needs {name}, write {meant}= in .env, with a value or without"
        for name, meant in misses.items()
        if not any(meant.lower() in layer.values for layer in layers)
    ]


def _problem(detail: ErrorDetails, layers: Sequence[Layer]) -> str:
    """One of pydantic's errors in the words of the user's keys."""
    field = str(detail["loc"][0])
    expects = next(mark.words for mark in Settings.model_fields[field].metadata if isinstance(mark, Expects))
    reason = f" ({detail['msg']})" if detail["type"] == "refused" else ""
    return f"{_where(field, layers)}: must be {expects}{reason}"


def _together(conflict: Conflict, layers: Sequence[Layer]) -> str:
    return f"{', '.join(_where(field, layers) for field in conflict.fields)}: {conflict.mend}"


def _where(field: str, layers: Sequence[Layer]) -> str:
    """The key, its value and where it was set, for a message."""
    for layer in layers:
        if field in layer.values:
            return f"{shown(field.upper(), layer.values[field])} ({layer.origins[field]})"
    default: Any = Settings.model_fields[field].default
    return f"{shown(field.upper(), default)} ({_DEFAULTS})"
