"""Which processes of this project's server run, here and on the worker hosts, and their end.

A process is known by `--instance ID` on its command line, so a crash that leaves no file behind hides nothing. The
ring's own processes are found by api.processes; here are the api process and the other machines. Called by start, stop
and status.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from config import Settings
from distributed.errors import HostError
from distributed.launch import run_dir
from distributed.ssh import run_script

END_TIMEOUT_S = 60.0


def find_api(root: Path, instance: str) -> psutil.Process | None:
    """The api process of `root`, also one that was started by hand (`python -m api`)."""
    for process in psutil.process_iter(["cmdline", "status"]):
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


def end_on_workers(settings: Settings, targets: list[str], instance: str) -> list[str]:
    """End the ranks that are left on other machines. Returns one message for each machine that could not be asked."""
    with ThreadPoolExecutor(max_workers=max(1, len(targets))) as pool:
        return list(filter(None, pool.map(lambda target: _end_on_worker(settings, target, instance), targets)))


def _end_on_worker(settings: Settings, target: str, instance: str) -> str | None:
    # awk gets the marker from the environment: on a command line it would find itself. A stopped process needs CONT.
    script = f"""export marker='-m server --instance {instance}'
left() {{ ps -axww -o pid= -o stat= -o command= | awk 'index($0, ENVIRON["marker"]) && $2 !~ /^Z/ {{print $1}}'; }}
[ -n "$(left)" ] || exit 0
kill -TERM $(left) 2>/dev/null; kill -CONT $(left) 2>/dev/null
n=0; while [ -n "$(left)" ] && [ $n -lt 25 ]; do sleep 0.2; n=$((n + 1)); done
[ -z "$(left)" ] || kill -KILL $(left) 2>/dev/null
sleep 0.2; [ -z "$(left)" ]
"""
    try:
        done = run_script(settings, target, script, timeout_s=END_TIMEOUT_S)
    except HostError as error:
        return str(error)
    if done.returncode == 0:
        return None
    return f"{target}: {done.stderr.strip() or 'a rank there does not end'}"


def _works_in(process: psutil.Process, root: Path) -> bool:
    try:
        return Path(process.cwd()) == root
    except (psutil.Error, OSError):
        return False
