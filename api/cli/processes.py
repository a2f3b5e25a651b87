"""Which api process of this project's server runs, and on which machines its last ring did.

A process is known by `--instance ID` on its command line, so a crash that leaves no file behind hides nothing. The
ring's own processes are found by api.processes, on other machines by distributed.remnants. Called by start, stop and
status.
"""

from __future__ import annotations

import json
from pathlib import Path

import psutil

from api.processes import own_processes
from distributed.launch import run_dir


def find_api(root: Path, instance: str) -> psutil.Process | None:
    """The api process of `root`, also one that was started by hand (`python -m api`)."""
    for process in own_processes():
        command = process.info["cmdline"] or []
        if process.info["status"] == psutil.STATUS_ZOMBIE or command[1:3] != ["-m", "api"]:
            continue
        if instance in command or ("--instance" not in command and _works_in(process, root)):
            return process
    return None


def worker_targets_of_last_ring(root: Path) -> list[str]:
    """The machines the last ring ran on, from the hostfile it was started with: .env may name others by now."""
    try:
        entries = json.loads((run_dir(root) / "hostfile.json").read_text())
    except (OSError, ValueError):
        return []
    return list(dict.fromkeys(entry["ssh"] for entry in entries if entry["ssh"] != "127.0.0.1"))


def _works_in(process: psutil.Process, root: Path) -> bool:
    try:
        return Path(process.cwd()) == root
    except (psutil.Error, OSError):
        return False
