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

from api.cli.health import Health, base_url, fetch_health, rank_lines
from api.cli.logs import LOG_FILE
from api.cli.processes import find_api
from api.cli.progress import Progress
from api.cli.stop import end_everything
from api.cli.workers import worker_model
from api.ports import check_port
from api.processes import ring_processes
from config import ConfigError, Settings, load_config
from config.load import export_passthrough
from distributed.blas import OPENBLAS
from distributed.hosts import ring_hosts, worker_targets
from distributed.launch import instance_id, run_dir
from distributed.workers import check_workers

POLL_S = 0.2
TIMEOUT_SLACK_S = 60.0  # the api itself ends a start that makes no progress; this is for an api that hangs
OUTPUT_FILE = "api.out"
REASON_LINES = 12


class StartFailed(Exception):
    """The server did not become ready; the message is for the terminal."""


def start(root: Path) -> int:
    make_dotenv(root)
    settings = load_config(root)
    run_dir(root).mkdir(exist_ok=True)
    with (run_dir(root) / "start.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another ./launch.sh start is at work; ./launch.sh status shows how far it is")
            return 0
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
        health = fetch_health(settings) or {}
        print(f"already running (pid {api.pid}, {health.get('status', 'no answer yet')}): {base_url(settings)}/v1")
        return 0
    if ring_processes(instance):
        print("ending what an earlier run left behind")
        end_everything(root, drain=False)
    check_api_port(settings)
    note_openblas()
    export_passthrough(settings)
    hosts = ring_hosts(settings)
    progress = Progress()
    model = worker_model(settings, root, progress.show)
    progress.end()
    if worker_targets(hosts):
        check_workers(settings, hosts, model, print)
    try:
        process = _spawn(root, instance)
        health = wait_until_ready(root, settings, process.poll)
    except (StartFailed, KeyboardInterrupt) as error:
        progress.end()
        end_everything(root, drain=False)
        print(f"the server did not start: {error or 'interrupted'}", file=sys.stderr)
        print(f"all of it is in {root / LOG_FILE}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    print("\n".join(ready_lines(settings, health)))
    return 0


def check_api_port(settings: Settings) -> None:
    """Raises ConfigError where the port cannot be listened on; the api checks too, but later and less in the open."""
    try:
        check_port(settings.api_host, settings.api_port)
    except OSError as error:
        raise ConfigError(
            f"API_HOST={settings.api_host}, API_PORT={settings.api_port}: cannot listen there"
            f" ({error.strerror}{_who_listens(settings.api_port)}). Stop that program, or set another API_PORT in .env"
        ) from error


def _who_listens(port: int) -> str:
    try:
        connections = psutil.net_connections("tcp")
        pid = next(c.pid for c in connections if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN)
        return f": process {pid}, {psutil.Process(pid).name()}" if pid else ""
    except (psutil.Error, StopIteration):  # macOS shows other processes' ports to root alone
        return ""


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


def wait_until_ready(root: Path, settings: Settings, exit_code: Callable[[], int | None]) -> Health:
    """`exit_code`: the api process's, None while it runs. Raises StartFailed with the reason."""
    progress = Progress()
    log_start = _size(root / LOG_FILE)
    patience_s = settings.start_timeout + TIMEOUT_SLACK_S
    shown, deadline = "", time.monotonic() + patience_s
    while time.monotonic() < deadline:
        health = fetch_health(settings, timeout_s=2.0)
        status = health["status"] if health else "starting"
        if health and status == "ready":
            progress.end()
            return health
        if (code := exit_code()) is not None:
            progress.end()
            raise StartFailed(_last_words(root, log_start) or f"the api process ended with code {code}")
        if health and status in ("failed", "stopping"):
            progress.end()
            raise StartFailed(health.get("detail") or status)
        detail = (health or {}).get("detail") or "starting the api process"
        if detail != shown:
            shown, deadline = detail, time.monotonic() + patience_s
        progress.show(detail)
        time.sleep(POLL_S)
    progress.end()
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
    key = ' \\\n  -H "Authorization: Bearer $API_KEY"' if settings.api_keys else ""
    body = f'{{"model": "{settings.model_name}", "messages": [{{"role": "user", "content": "What is a ring?"}}]}}'
    lines = [
        "",
        *rank_lines(health.get("ranks") or []),
        "",
        f"ready: {settings.model_name} at {url}/v1",
        "",
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n  -d '{body}'",
    ]
    if key:
        lines.append("\n(API_KEY: one of the keys in API_KEYS)")
    return lines
