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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
from pydantic import ValidationError

from api.processes import runs
from api.runtime_files import API_FILE, RELOAD_FILE, write_json
from config import Settings
from config.names import is_foreign
from config.settings import PROCESS_FIELDS, RING_FIELDS

logger = logging.getLogger(__name__)

ASK = signal.SIGUSR1
ANSWER_S = 10.0
POLL_S = 0.02

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
    fields = settings.model_dump(mode="json", include=set(PROCESS_FIELDS))
    fields["api_keys"] = [(entry.label, entry.key.get_secret_value()) for entry in settings.api_keys]
    foreign = settings.passthrough_env | {name: value for name, value in environ.items() if is_foreign(name)}
    digest.update(json.dumps([fields, foreign], sort_keys=True).encode())
    return digest.hexdigest()


# -- the command line's side -----------------------------------------------------------------------------------------


def may_ask(folder: Path, api: psutil.Process, basis: str) -> bool:
    """Whether the running process knows the signal, and differs from one started now in nothing but its ring."""
    try:
        about = json.loads((folder / API_FILE).read_text())
    except (OSError, ValueError):
        return False
    return about.get("pid") == api.pid and about.get("basis") == basis


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
