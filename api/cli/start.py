"""`start`: everything between a fresh folder and a server that answers.

It prepares (.env, model, hosts), starts `python -m api` detached, and waits until /health says ready, showing what it
waits for. When that fails it says why and leaves nothing running. Called by launch.sh once the environment is there.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from api import reload
from api.cli.checks import check_start
from api.cli.health import Health, base_url, fetch_health, not_applied, rank_lines, url_for_others
from api.cli.logs import LOG_FILE
from api.cli.processes import as_it_listens, find_api
from api.cli.progress import Progress
from api.cli.stop import end_everything
from api.processes import ring_processes
from config import Settings, load_config, with_origins
from config.combinations import warnings
from distributed.blas import OPENBLAS
from distributed.launch import instance_id, run_dir

POLL_S = 0.2
TIMEOUT_SLACK_S = 60.0  # the api itself ends a start that makes no progress; this is for an api that hangs
OUTPUT_FILE = "api.out"
REASON_LINES = 12


class StartFailed(Exception):
    """The server did not become ready; the message is for the terminal."""


def start(root: Path) -> int:
    """Exit code 0 only where the server is ready; a start that is at work already is waited for."""
    make_dotenv(root)
    settings = load_config(root)
    run_dir(root).mkdir(exist_ok=True)
    with (run_dir(root) / "start.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another ./launch.sh start is at work: waiting for its end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return _start(root, settings)


def make_dotenv(root: Path) -> None:
    if not (root / ".env").exists() and (root / ".env.example").exists():
        draft = root / ".run" / "env.partial"
        draft.parent.mkdir(exist_ok=True)
        shutil.copyfile(root / ".env.example", draft)
        draft.replace(root / ".env")
        print("wrote .env from .env.example: all settings are there, with their defaults")


def _start(root: Path, settings: Settings) -> int:
    instance = instance_id(root)
    if api := find_api(root, instance):
        return _runs_already(root, settings, api)
    if ring_processes(instance):
        print("ending what an earlier run left behind")
        end_everything(root, drain=False)
    note_openblas()
    check_start(root, settings, print)
    try:
        process = _spawn(root, instance)
        health = wait_until_ready(root, settings, process.poll)
    except (StartFailed, KeyboardInterrupt) as error:
        end_everything(root, drain=False)
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else with_origins(str(error), root)
        print(f"the server did not start: {reason}", file=sys.stderr)
        print(f"all of it is in {root / LOG_FILE}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    print("\n".join(ready_lines(settings, health)))
    return 0


def _runs_already(root: Path, settings: Settings, api: psutil.Process) -> int:
    listening = as_it_listens(root, api, settings)
    state = (fetch_health(listening) or {}).get("status", "no answer yet")
    print(f"already running (pid {api.pid}, {state}): {base_url(listening)}/v1")
    if changed := reload.differences(run_dir(root), api, settings):
        print(not_applied(changed))
    if state == "ready":
        return 0
    print("it is not ready; ./launch.sh status and ./launch.sh logs say more", file=sys.stderr)
    return 1


def note_openblas() -> None:
    """MLX's Linux wheel has only the slow reference BLAS."""
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(OPENBLAS)
    except OSError:
        print(
            "note: OpenBLAS is not installed. With it prompts are read about 12 times faster on this machine:\n"
            "  sudo apt install libopenblas0      (Fedora: sudo dnf install openblas), then ./launch.sh restart"
        )


def _spawn(root: Path, instance: str) -> subprocess.Popen[bytes]:
    """Start the api in a session of its own, so that it outlives this terminal."""
    with (run_dir(root) / OUTPUT_FILE).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "api", "--instance", instance],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    if sys.platform == "darwin":
        # Holds off idle sleep for as long as the api runs.
        subprocess.Popen(["caffeinate", "-i", "-w", str(process.pid)], start_new_session=True)
    return process


def wait_until_ready(root: Path, settings: Settings, exit_code: Callable[[], int | None], said: str = "") -> Health:
    """Raises StartFailed with the reason. `exit_code`: the api process's or None; `said`: was printed before."""
    progress = Progress(said)
    try:
        return _wait_until_ready(root, settings, exit_code, progress)
    finally:
        progress.end()


def _wait_until_ready(
    root: Path, settings: Settings, exit_code: Callable[[], int | None], progress: Progress
) -> Health:
    log_start = _size(root / LOG_FILE)
    patience_s = settings.start_timeout + TIMEOUT_SLACK_S
    shown, deadline = "", time.monotonic() + patience_s
    while time.monotonic() < deadline:
        health = fetch_health(settings, timeout_s=2.0)
        status = health["status"] if health else "starting"
        if health and status == "ready":
            return health
        if (code := exit_code()) is not None:
            raise StartFailed(_last_words(root, log_start) or f"the api process ended with code {code}")
        if health and status in ("failed", "stopping"):
            raise StartFailed(health.get("detail") or status)
        detail = (health or {}).get("detail") or "starting the api process"
        if detail != shown:
            shown, deadline = detail, time.monotonic() + patience_s
        progress.show(detail)
        time.sleep(POLL_S)
    raise StartFailed(f"it made no progress for START_TIMEOUT={settings.start_timeout:g} s; last: {shown}")


def _last_words(root: Path, log_start: int) -> str:
    """Why the api process ended: what it wrote to stderr, or else the errors in the log since `log_start` (bytes)."""
    output = run_dir(root) / OUTPUT_FILE  # not there for one that was started by hand, which restart waits for too
    said = output.read_text(errors="replace").strip().splitlines() if output.exists() else []
    if said:
        return "\n".join(said[-REASON_LINES:])
    if not (root / LOG_FILE).exists():
        return ""
    with (root / LOG_FILE).open("rb") as log:
        log.seek(log_start if log_start <= _size(root / LOG_FILE) else 0)
        lines = log.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if "ERROR" in line or "CRITICAL" in line]
    return "\n".join(errors[-REASON_LINES:])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def ready_lines(settings: Settings, health: Health) -> list[str]:
    """What a new user needs: the URL, a line to paste, and what each rank holds."""
    url = base_url(settings)
    key = ' \\\n  -H "Authorization: Bearer $SERVER_KEY"' if settings.api_keys else ""
    body = f'{{"model": "{settings.model_name}", "messages": [{{"role": "user", "content": "What is a ring?"}}]}}'
    lines = [
        "",
        *rank_lines(health.get("ranks") or []),
        "",
        f"ready: {settings.model_name} at {url}/v1",
        *(f"from other machines: {others}/v1" for others in url_for_others(settings)),
        *(f"warning: {warning}" for warning in warnings(settings)),
        "",
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n  -d '{body}'",
    ]
    if key:
        lines.append("\n(SERVER_KEY: one of the keys in API_KEYS)")
    return lines
