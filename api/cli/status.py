"""`status`: what the server of this folder is doing, for people; /health has the same as JSON. Changes nothing.

It tells of what runs, whatever .env has become since. Its exit code is by the server alone: 0 where /health answers, in
any state; 1 where the process runs and does not answer; 3 where nothing runs.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from api import reload
from api.cli.health import Health, absence_line, base_url, fetch_health, not_applied, rank_lines
from api.cli.processes import as_it_listens, find_api
from api.processes import ring_processes
from config import ConfigError, Settings, load_config
from distributed.launch import instance_id, run_dir

NO_ANSWER = 1
NOT_RUNNING = 3


def status(root: Path) -> int:
    api = find_api(root, instance_id(root))
    try:
        settings, mistake = load_config(root), ""
    except ConfigError as error:
        settings, mistake = Settings(project_root=root), str(error)
    code = _not_running(root) if api is None else _running(root, settings, api)
    if mistake:
        print(f"the next start or restart will be refused:\n{mistake}")
    elif api is not None and (changed := reload.differences(run_dir(root), api, settings)):
        print(not_applied(changed))
    return code


def _not_running(root: Path) -> int:
    print("not running")
    if left := ring_processes(instance_id(root)):
        pids = ", ".join(str(process.pid) for process in left)
        print(f"but processes of an earlier run are left ({pids}): ./launch.sh stop ends them")
    return NOT_RUNNING


def _running(root: Path, settings: Settings, api: psutil.Process) -> int:
    listening = as_it_listens(root, api, settings)
    health = fetch_health(listening)
    if health is None:
        print(f"the api process {api.pid} runs, and {base_url(listening)}/health does not answer")
        print("it may just be starting; if it stays so: ./launch.sh restart")
        return NO_ANSWER
    print("\n".join(status_lines(health, base_url(listening), api.pid)))
    return 0


def status_lines(health: Health, url: str, pid: int) -> list[str]:
    lines = [
        f"{health['status']}{': ' + health['detail'] if health.get('detail') else ''}",
        f"  model     {health['model']}",
        f"  url       {url}/v1",
        f"  uptime    {timedelta(seconds=round(health.get('uptime_s') or 0))} (pid {pid})",
    ]
    if "requests" not in health:  # it knows another key, or .env with ours cannot be read
        return [*lines, "  (it says more only to those who show one of its API_KEYS, and .env holds none of them)"]
    requests: dict[str, Any] = health["requests"]
    lines.append(f"  requests  {requests['running']} running, {requests['waiting']} waiting")
    if health.get("max_sequence_length"):
        longest, room = health["max_sequence_length"], health["kv_cache_tokens"]
        lines.append(f"  limits    {longest:,} tokens a request; the KV cache has room for {room:,} tokens")
    lines += ["  " + absence_line(away) for away in health.get("waiting_for") or []]
    return lines + ["  " + line for line in rank_lines(health.get("ranks") or [])]
