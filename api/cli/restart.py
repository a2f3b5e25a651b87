"""`restart`: applies .env, with a new ring under the running api process where that is enough, else from the start.

What can be found before is found while the old server still serves, which then goes on. A new ring keeps every accepted
request; what the api process holds itself (the model, its own settings, its code) takes a new one, for which the
requests are let to end first. Called by launch.sh once the environment is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from api import reload
from api.cli.checks import Checked, check_start
from api.cli.health import fetch_health
from api.cli.processes import find_api, worker_targets_of_last_ring
from api.cli.start import StartFailed, make_dotenv, ready_lines, start, wait_until_ready
from api.cli.stop import end_everything
from api.processes import runs
from config import ConfigError, Settings, load_config, with_origins
from distributed.errors import DistributedError
from distributed.hosts import worker_targets
from distributed.launch import instance_id, run_dir
from distributed.remnants import end_on_workers


def restart(root: Path) -> int:
    make_dotenv(root)
    api = find_api(root, instance_id(root))
    if api is None:
        load_config(root)  # a mistake is said alone, without what `end_everything` makes of it
        end_everything(root)
        return start(root)
    try:
        settings = load_config(root)
        keeps_api = reload.may_ask(run_dir(root), api, reload.basis(settings, os.environ))
        # The ring that serves has the ports, so its links are not tried. `start` asks the machines again, and tells.
        checked = check_start(root, settings, print if keeps_api else _silent, with_links=False)
    except (ConfigError, DistributedError) as error:
        print(with_origins(str(error), root), file=sys.stderr)
        print(f"nothing was stopped: the server (pid {api.pid}) goes on with the settings it has", file=sys.stderr)
        return 1
    if keeps_api and (fetch_health(settings) or {}).get("status") in ("ready", "restarting"):
        code = _new_ring(root, settings, api, checked)
        if code is not None:
            return code
    end_everything(root)
    code = 1
    try:
        code = start(root)
    finally:
        if code:
            print("the server from before was stopped for this, and none runs now: ./launch.sh start", file=sys.stderr)
    return code


def _silent(_: str) -> None: ...


def _new_ring(root: Path, settings: Settings, api: psutil.Process, checked: Checked) -> int | None:
    """The exit code; None where the api process does not start another ring."""
    before = worker_targets_of_last_ring(root)
    if not reload.ask(run_dir(root), api, settings, checked.info.path):
        return None
    print(reload.TAKES_OVER, flush=True)
    try:
        health = wait_until_ready(root, settings, lambda: None if runs(api) else -1, said=reload.TAKES_OVER)
    except StartFailed as error:
        print(f"the new ring did not start: {with_origins(str(error), root)}", file=sys.stderr)
        return 1
    if refused := health.get("detail"):
        print(with_origins(refused, root), file=sys.stderr)
        return 1
    now = worker_targets(checked.hosts)
    end_on_workers(settings, [target for target in before if target not in now], instance_id(root))
    print("\n".join(ready_lines(settings, health)))
    return 0
