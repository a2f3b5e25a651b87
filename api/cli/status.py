"""`status`: what the server of this folder is doing, for people; /health has the same as JSON. Changes nothing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from api.cli.health import absence_line, base_url, fetch_health, rank_lines
from api.cli.processes import find_api
from api.processes import ring_processes
from config import load_config
from distributed.launch import instance_id

NOT_RUNNING = 3


def status(root: Path) -> int:
    settings = load_config(root)
    instance = instance_id(root)
    api = find_api(root, instance)
    if api is None:
        left = ring_processes(instance)
        print("not running")
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            print(f"but processes of an earlier run are left ({pids}): ./launch.sh stop ends them")
        return NOT_RUNNING
    health = fetch_health(settings)
    if health is None:
        print(f"the api process {api.pid} runs, and {base_url(settings)}/health does not answer")
        print("it may be starting, or .env names another port than it was started with: ./launch.sh restart")
        return 1
    requests = health.get("requests") or {}
    lines = [
        f"{health['status']}{': ' + health['detail'] if health.get('detail') else ''}",
        f"  model     {health['model']}",
        f"  url       {base_url(settings)}/v1",
        f"  uptime    {timedelta(seconds=round(health.get('uptime_s') or 0))} (pid {api.pid})",
        f"  requests  {requests.get('running', 0)} running, {requests.get('waiting', 0)} waiting",
    ]
    if health.get("max_sequence_length"):
        lines.append(
            f"  limits    {health['max_sequence_length']:,} tokens a request, {health['kv_cache_tokens']:,} tokens in"
            " the KV cache"
        )
    lines += ["  " + absence_line(away) for away in health.get("waiting_for") or []]
    print("\n".join([*lines, *("  " + line for line in rank_lines(health.get("ranks") or []))]))
    return 0
