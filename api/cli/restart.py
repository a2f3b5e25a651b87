"""`restart`: applies .env, with a new ring under the running api process where that is enough, else from the start.

A mistake in .env is found while the server still serves. A new ring keeps every accepted request; what the api process
holds itself (the model, its own settings, its code) takes a new one, for which the requests are let to end first.
Called by launch.sh once the environment is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from api import reload
from api.cli.health import fetch_health
from api.cli.processes import find_api, worker_targets_of_last_ring
from api.cli.progress import Progress
from api.cli.start import StartFailed, make_dotenv, ready_lines, start, wait_until_ready
from api.cli.stop import end_everything
from api.cli.workers import worker_model
from api.processes import runs
from config import Settings, load_config
from config.load import export_passthrough
from distributed.hosts import ring_hosts, worker_targets
from distributed.launch import instance_id, run_dir
from distributed.model_files import prepare_model
from distributed.remnants import end_on_workers
from distributed.workers import check_workers


def restart(root: Path) -> int:
    make_dotenv(root)
    settings = load_config(root)
    api = find_api(root, instance_id(root))
    if api is not None and reload.may_ask(run_dir(root), api, reload.basis(settings, os.environ)):
        health = fetch_health(settings) or {}
        if health.get("status") in ("ready", "restarting"):
            code = _new_ring(root, settings, api)
            if code is not None:
                return code
    end_everything(root)
    return start(root)


def _new_ring(root: Path, settings: Settings, api: psutil.Process) -> int | None:
    """The exit code; None where the api process does not start another ring. HostError and ModelError as in `start`."""
    export_passthrough(settings)
    hosts, before = ring_hosts(settings), worker_targets_of_last_ring(root)
    progress = Progress()
    model = worker_model(settings, root, progress.show)
    progress.end()
    if worker_targets(hosts):
        check_workers(settings, hosts, model, print, with_links=False)  # the ring that serves has their ports
    if not reload.ask(run_dir(root), api, settings, prepare_model(settings.model_repo, root)):
        return None
    print("a new ring takes over; accepted requests wait for it")
    try:
        health = wait_until_ready(root, settings, lambda: None if runs(api) else -1)
    except StartFailed as error:
        print(f"the new ring did not start: {error}", file=sys.stderr)
        return 1
    if refused := health.get("detail"):
        print(refused, file=sys.stderr)
        return 1
    end_on_workers(settings, [target for target in before if target not in worker_targets(hosts)], instance_id(root))
    print("\n".join(ready_lines(settings, health)))
    return 0
