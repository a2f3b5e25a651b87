"""What a running server leaves in .run/ for `launch.sh`: who runs, and a lock that says that it does.

The kernel frees the lock when the process ends, however it ends, so a stale file is never taken for a running server.
Nothing here is needed to serve. Called by the api's entry point and its supervisor.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

API_FILE = "api.json"
RING_FILE = "ring.json"
RELOAD_FILE = "reload.json"  # settings that wait for the api to take them over, see api.reload
LOCK_FILE = "lock"


class AlreadyRunning(Exception):
    """Another server of this project folder holds the lock."""


@contextlib.contextmanager
def only_server_of(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder` (.run) and removes the other files at the end. Raises AlreadyRunning."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"a server of this folder runs already (it holds {folder / LOCK_FILE})") from None
        try:
            yield
        finally:
            for name in (API_FILE, RING_FILE, RELOAD_FILE):
                (folder / name).unlink(missing_ok=True)


def lock_port(port: int) -> IO[str]:
    """Holds `port` among our servers on this machine until the file is closed. Raises AlreadyRunning.

    MLX binds its ring's ports with SO_REUSEPORT and closes its listeners once the ring is formed, so the port itself
    says neither that another ring has it nor that another ring is just being formed on it.
    """
    lock = (Path(tempfile.gettempdir()) / f"mlx-ring-server-{os.getuid()}-port-{port}.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise AlreadyRunning(f"another server on this machine has port {port} for its ring") from None
    return lock


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty where it is not there, or something else is."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces the file as a whole, so a reader never sees half of it. Nobody but its owner may read it."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
