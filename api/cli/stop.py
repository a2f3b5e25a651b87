"""`stop`: ends the server and leaves nothing running, also after a crash, with hung ranks, or with a broken .env.

It asks before it kills: the api drains its requests and ends the ring; what is then left gets SIGTERM and at last
SIGKILL. Called by launch.sh, and by start when it fails.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil

from api.cli.processes import find_api, worker_targets_of_last_ring
from api.processes import end_processes, ring_processes
from config import ConfigError, Settings, load_config
from distributed.launch import instance_id, run_dir
from distributed.remnants import end_on_workers

TERM_GRACE_S = 5.0
API_END_GRACE_S = 25.0  # on top of SHUTDOWN_GRACE_S: the api gives the ring time to end as well


def stop(root: Path) -> int:
    if not find_api(root, instance_id(root)) and not ring_processes(instance_id(root)):
        was_running = bool(worker_targets_of_last_ring(root))
        code = end_everything(root) if was_running else 0
        print("not running")
        return code
    code = end_everything(root)
    print("stopped" if code == 0 else "stopped here")
    return code


def end_everything(root: Path, *, drain: bool = True) -> int:
    """End the server of `root` on all machines. 1 where a machine could not be asked; `drain`: let requests end."""
    try:
        settings = load_config(root)
    except ConfigError as error:
        print(f"{error}\nstopping with default settings", file=sys.stderr)
        settings = Settings(project_root=root)
    instance = instance_id(root)
    if api := find_api(root, instance):
        _end_api(api, settings.shutdown_grace_s if drain else 0.0)
    end_processes(ring_processes(instance), TERM_GRACE_S)
    failures = end_on_workers(settings, worker_targets_of_last_ring(root), instance)
    for failure in failures.values():
        print(f"could not look for ranks there: {failure}", file=sys.stderr)
    if not failures:
        (run_dir(root) / "hostfile.json").unlink(missing_ok=True)
    return 1 if failures else 0


def _end_api(api: psutil.Process, drain_s: float) -> None:
    """The api drains on a signal, and skips that on a second one. Killed when it takes longer than it may."""
    # Two of a kind may arrive as one.
    signals = [signal.SIGTERM] if drain_s > 0 else [signal.SIGTERM, signal.SIGINT]
    if drain_s > 0:
        print(f"stopping (requests that run may take up to {drain_s:.0f} s to end)")
    try:
        for signal_number in signals:
            api.send_signal(signal_number)
        api.resume()  # a stopped process gets no SIGTERM
        api.wait(drain_s + API_END_GRACE_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        print(f"the api process {api.pid} does not end; killing it", file=sys.stderr)
        end_processes([api], grace_s=0.0)
