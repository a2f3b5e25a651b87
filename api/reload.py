"""How `launch.sh restart` has a running api process start a ring with other settings, instead of ending it.

By a file and a signal: the command line writes the settings that it has read and checked, and the api takes the file
away as its answer. The api reads neither .env nor an environment again, so what it holds never changes under it. Asked
by api.cli.restart, answered by `python -m api`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
from pydantic import ValidationError

from api.processes import runs
from api.runtime_files import API_FILE, RELOAD_FILE, RING_FILE, read_json, write_json
from config import Settings
from config.names import is_foreign
from config.settings import PROCESS_FIELDS, RING_FIELDS

logger = logging.getLogger(__name__)

ASK = signal.SIGUSR1
ANSWER_S = 10.0
POLL_S = 0.02
TAKES_OVER = "a new ring takes over; accepted requests wait for it"

_PROJECT = Path(__file__).resolve().parent.parent
_PACKAGES = ("api", "config", "distributed", "server")


class Reload(msgspec.Struct, frozen=True):
    """What is asked for."""

    settings: dict[str, Any]  # RING_FIELDS, as JSON values
    model_path: str  # the folder that MODEL_REPO stands for now


def basis(settings: Settings, environ: Mapping[str, str]) -> str:
    """What a process stands on that a new ring cannot change: code, PROCESS_FIELDS, other programs' variables.

    A digest, because there are keys in it.
    """
    digest = hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (_PROJECT / package).rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update((_PROJECT / "requirements.lock").read_bytes())
    foreign = settings.passthrough_env | {name: value for name, value in environ.items() if is_foreign(name)}
    digest.update(json.dumps([digests(settings, PROCESS_FIELDS), foreign], sort_keys=True).encode())
    return digest.hexdigest()


def digests(settings: Settings, fields: Iterable[str]) -> dict[str, str]:
    """A digest of each field's value: enough to see later which ones differ, and keys are not shown."""
    values = settings.model_dump(mode="json", include=set(fields))
    if "api_keys" in values:
        values["api_keys"] = [(entry.label, entry.key.get_secret_value()) for entry in settings.api_keys]
    return {field: hashlib.sha256(json.dumps(values[field]).encode()).hexdigest() for field in sorted(values)}


# -- the command line's side -----------------------------------------------------------------------------------------


def may_ask(folder: Path, api: psutil.Process, basis: str) -> bool:
    """Whether the running process knows the signal, and differs from one started now in nothing but its ring."""
    about = read_json(folder / API_FILE)
    return about.get("pid") == api.pid and about.get("basis") == basis


def differences(folder: Path, api: psutil.Process, settings: Settings) -> list[str]:
    """The keys of which `settings` has other values than the running server, as far as that has said what it has."""
    about, ring = read_json(folder / API_FILE), read_json(folder / RING_FILE)
    if about.get("pid") != api.pid or "keys" not in about:
        return []
    held = about["keys"] | ring.get("keys", {})
    now = digests(settings, held)
    return [field.upper() for field in now if now[field] != held[field]]


def ask(folder: Path, api: psutil.Process, settings: Settings, model_path: Path) -> bool:
    """Whether the api process starts a ring with these settings. It does not where it is not serving, or is stuck."""
    file = folder / RELOAD_FILE
    dump = settings.model_dump(mode="json", include=set(RING_FIELDS))
    write_json(file, msgspec.to_builtins(Reload(dump, str(model_path))))
    deadline = time.monotonic() + ANSWER_S
    try:
        api.send_signal(ASK)
        while file.exists() and runs(api) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        file.unlink()
    except psutil.NoSuchProcess:
        file.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    return False


# -- the api's side --------------------------------------------------------------------------------------------------


def read_asked(folder: Path, settings: Settings) -> tuple[Settings, Path] | None:
    """`settings` with what is asked for, and the model's folder; None where nothing is, or what makes no sense."""
    try:
        asked = msgspec.json.decode((folder / RELOAD_FILE).read_bytes(), type=Reload)
        other = Settings.from_ranks({**asked.settings, "project_root": settings.project_root})
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValidationError) as error:
        logger.error("%s cannot be used: %s", RELOAD_FILE, error)
        return None
    changed = {field: getattr(other, field) for field in RING_FIELDS}
    return settings.model_copy(update=changed), Path(asked.model_path)


def confirm(folder: Path) -> None:
    """The answer: it is being done."""
    (folder / RELOAD_FILE).unlink(missing_ok=True)
