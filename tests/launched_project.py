"""A copy of this project in a folder of its own, used as people do: through its launch.sh.

The copy's .venv consists of links to the environment the tests run in, so nothing is installed. Used by the tests of
the command line and of several hosts; tests of the api use `RunningServer`, which is lighter.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from api.cli.health import fetch_health
from config import load_config
from distributed.launch import instance_id
from tests.ports import free_ports

PROJECT = Path(__file__).resolve().parent.parent
PARTS = ("api", "config", "distributed", "server", "launch.sh", "requirements.lock", "requirements-dev.lock")
COMMAND_S = 180.0


class LaunchedProject:
    def __init__(self, root: Path, **keys: object) -> None:
        """`keys` become .env, after a free API_PORT and RING_PORT."""
        root.mkdir(parents=True)
        self.root = root
        for part in PARTS:
            source = PROJECT / part
            if source.is_dir():
                shutil.copytree(source, root / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, root / part)
        link_environment(root)
        self.keys: dict[str, object] = {"API_PORT": free_ports(1), "RING_PORT": free_ports(8), "START_TIMEOUT": 90}
        self.write_dotenv(**keys)

    @property
    def instance(self) -> str:
        return instance_id(self.root)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.keys['API_PORT']}"

    @property
    def model(self) -> str:
        return str(self.keys["MODEL_NAME"])

    def write_dotenv(self, **keys: object) -> None:
        """Set these keys in .env and keep the others."""
        self.keys.update(keys)
        (self.root / ".env").write_text("".join(f"{key}={value}\n" for key, value in self.keys.items()))

    def launch(
        self, *arguments: str, cwd: Path | None = None, keys: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ./launch.sh with these arguments, `keys` in the environment; stdout holds stderr as well."""
        return subprocess.run(
            [str(self.root / "launch.sh"), *arguments],
            cwd=cwd or self.root,
            env={**clean_environment(), **(keys or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )

    def health(self) -> dict[str, Any]:
        return fetch_health(load_config(self.root, environ={})) or {}

    def processes(self) -> list[psutil.Process]:
        """Everything that carries this project's mark: api, mlx.launch, ssh, ranks."""
        found = psutil.process_iter(["cmdline", "status"])
        return [
            process
            for process in found
            if f"--instance {self.instance}" in " ".join(process.info["cmdline"] or [])
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def ranks(self) -> list[psutil.Process]:
        return [process for process in self.processes() if process.info["cmdline"][1:3] == ["-m", "server"]]

    def end(self) -> None:
        """Whatever a test did, nothing stays."""
        for process in self.processes():
            process.send_signal(signal.SIGKILL)


def clean_environment() -> dict[str, str]:
    """This environment without our own keys, which would win over .env."""
    ours = {key for key in os.environ if key in _keys() or key == "MLX_RING_ROOT"}
    return {key: value for key, value in os.environ.items() if key not in ours}


def _keys() -> set[str]:
    from config.settings import KEYS

    return set(KEYS)


def link_environment(folder: Path) -> None:
    """A .venv in `folder` that is the environment of these tests and counts as installed."""
    venv = folder / ".venv"
    venv.mkdir(parents=True)
    running = Path(sys.prefix)
    for part in ("bin", "lib", "include"):
        (venv / part).symlink_to(running / part)
    shutil.copy2(running / "pyvenv.cfg", venv / "pyvenv.cfg")
    for lock in ("requirements.lock", "requirements-dev.lock"):
        shutil.copy2(PROJECT / lock, venv / f".installed-{lock}")
