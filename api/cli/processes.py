"""Which api process of this project's server runs, and on which machines its last ring did.

A process is known by `--instance ID` on its command line, so a crash that leaves no file behind hides nothing. The
ring's own processes are found by api.processes, on other machines by distributed.remnants. Called by all commands that
ask for the running server.
"""

from __future__ import annotations

import json
from pathlib import Path

import psutil

from api.processes import own_processes
from api.runtime_files import API_FILE, RING_FILE, read_json
from config import Settings
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


def as_it_listens(root: Path, api: psutil.Process, settings: Settings) -> Settings:
    """`settings` with the address that the running process was started with, as far as it has said that."""
    about = read_json(run_dir(root) / API_FILE)
    if about.get("pid") != api.pid:
        return settings
    return settings.model_copy(update={"api_host": about["host"], "api_port": about["port"]})


def ports_of_ring(root: Path) -> set[int]:
    """The ports on this machine that the running server's ring has, or had a moment ago."""
    return set(read_json(run_dir(root) / RING_FILE).get("ports", []))


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
