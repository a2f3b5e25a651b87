"""The servers that are compared: ours at any ring size, and mlx_lm.server, alone or pipelined over two ranks.

All stay loaded for a whole run and compute only in their turns. mlx_lm's processes are stopped (SIGSTOP) outside of
theirs: its pipeline spins 1.8 cores while it waits. Ours wait at less than 1 % of a core and are left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bench.client import Request, Target, ask_all
from distributed.layer_times import times_file
from tests.ports import free_ports
from tests.running_server import PROJECT, RunningServer

START_S = 120.0
WITHOUT_LAUNCHER = ", mlx.launch stopped"

Turn = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Contestant:
    """`turn()` is entered while it is asked."""

    name: str
    target: Target
    turn: Turn = contextlib.nullcontext
    is_ours: bool = False


def end_in_order() -> None:
    """SIGTERM ends this benchmark like ctrl-C, with its servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


@contextlib.contextmanager
def ours(
    name: str, folder: Path, scratch: Path, banned: tuple[int, ...] = (), *, ranks: int, **keys: object
) -> Iterator[Contestant]:
    """`python -m api` with a ring of `ranks`; `keys` are settings, those that are None are left out."""
    environ = {
        "MODEL_REPO": str(folder),
        "RING_SIZE": str(ranks),
        "KV_CACHE_RESERVED_MEMORY_MB": "1024",
        "REQUEST_TIMEOUT": "3600",  # a long prompt on a slow machine shows nothing for minutes
        "SHUTDOWN_GRACE_S": "1",
        "LOG_LEVEL": "WARNING",
        **{key: str(value) for key, value in keys.items() if value is not None},
    }
    server = RunningServer(scratch / name.replace(" ", "-"), environ)
    _share_layer_times(scratch / "layer-times.json", times_file(server.root), server.start)
    try:
        yield Contestant(name, Target(server.url, server.model, banned), is_ours=True)
    finally:
        server.stop()


def _share_layer_times(shared: Path, own: Path, start: Callable[[], None]) -> None:
    """Servers of one benchmark split the layers by the same times, or two of one ring size would differ by them."""
    if shared.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared, own)
    start()
    if own.exists():
        shutil.copy(own, shared)


@contextlib.contextmanager
def mlx_lm_server(
    folder: Path, scratch: Path, banned: tuple[int, ...], *, pipeline: bool
) -> Iterator[list[Contestant]]:
    """`mlx_lm.server`, or two ranks of it with --pipeline under mlx.launch, without its cache of earlier prompts.

    The pipeline competes twice: as it is, and with mlx.launch itself stopped, which spins on a core while its ranks
    run. On a machine with cores to spare that costs nothing; on two it would be measured instead of the pipeline.
    """
    port = free_ports(1)
    program = [sys.executable, "-m", "bench.mlx_lm_server", "--model", str(folder), "--port", str(port)]
    program += ["--prompt-cache-size", "0", "--log-level", "WARNING"]
    if pipeline:
        script = str(Path(sys.executable).with_name("mlx.launch"))
        launcher = [sys.executable, script, "--backend", "ring", "--repeat-hosts", "2"]
        program = [*launcher, "--starting-port", str(free_ports(2)), "--", *program, "--pipeline"]
    log = scratch / f"mlx_lm-{'pipeline' if pipeline else 'alone'}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            program,
            cwd=PROJECT,
            # mlx.launch leaves its pid files where temporary files are.
            env=os.environ | {"TMPDIR": str(scratch)},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        target = Target(f"http://127.0.0.1:{port}", "default_model", banned)
        _wait_ready(process, target, log)
        processes = _family(process)
        for member in processes:
            member.suspend()
        if pipeline:
            name = "mlx_lm.server --pipeline"
            yield [
                Contestant(name, target, lambda: _awake(processes)),
                Contestant(name + WITHOUT_LAUNCHER, target, lambda: _awake(processes[1:])),
            ]
        else:
            yield [Contestant("mlx_lm.server", target, lambda: _awake(processes))]
    finally:
        for member in _family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process, first, and all it started."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def _awake(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.resume()
    try:
        yield
    finally:
        for process in processes:
            process.suspend()


def _wait_ready(process: subprocess.Popen[bytes], target: Target, log: Path) -> None:
    """Until it has answered: it listens before it has loaded the model."""
    deadline = time.monotonic() + START_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"mlx_lm.server did not start:\n{log.read_text()}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{target.url}/health", timeout=5).status_code == 200:
                break
        time.sleep(0.2)
    ask_all(target, [Request([{"role": "user", "content": "Hello"}], max_tokens=2)])
