"""A real ring for tests: mlx.launch and `python -m server` processes, with the test in the api process's place."""

from __future__ import annotations

import contextlib
import queue
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from config import load_config
from distributed.launch import ring_command
from server.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Configure,
    Failed,
    FromEngine,
    Progress,
    Ready,
    SamplingParams,
    SequenceOutput,
    Shutdown,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
    encode,
)
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent
GREEDY = SamplingParams(temperature=0.0)
_decoder = msgspec.msgpack.Decoder(FromEngine)


class RingUnderTest:
    """A running ring; `messages` are all that came from rank 0 so far, but for the stats, of which `stats` is the
    last.
    """

    def __init__(self, connection: socket.socket, launcher: subprocess.Popen[bytes], log: Path) -> None:
        self.launcher = launcher
        self.log = log
        self.stats: Stats | None = None
        self._connection = connection
        self._inbox: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        stream = self._connection.makefile("rb")
        with contextlib.suppress(OSError):
            while prefix := stream.read(4):
                self._inbox.put(_decoder.decode(stream.read(struct.unpack(">I", prefix)[0])))
        self._inbox.put(None)

    def send(self, message: ToEngine) -> None:
        self._connection.sendall(encode(message))

    def next(self, timeout_s: float = 120) -> FromEngine | None:
        """The next message, None at the end of rank 0."""
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"nothing from rank 0 for {timeout_s} s; its log:\n{self.log.read_text()}") from None
        if isinstance(message, Stats):
            self.stats = message
        if isinstance(message, (Progress, Ready)) and self.launcher.stdin is not None:
            self.launcher.stdin.write(b"\n")  # mlx.launch stops spinning when it finds that nobody reads
            self.launcher.stdin.flush()
        return message

    def wait_ready(self) -> Ready:
        while not isinstance(message := self.next(), Ready):
            assert message is not None and not isinstance(message, Failed), f"{message}\n{self.log.read_text()}"
        return message

    def wait_failed(self) -> Failed:
        while not isinstance(message := self.next(), Failed):
            assert message is not None and not isinstance(message, Ready), f"{message}\n{self.log.read_text()}"
        return message

    def wait_stats(self, condition: Any, timeout_s: float = 30) -> Stats:
        """The first stats for which `condition(stats)` holds."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            message = self.next()
            assert message is not None, self.log.read_text()
            if isinstance(message, Stats) and condition(message):
                return message
        raise TimeoutError(f"no such stats; the last: {self.stats}")

    def wait_log(self, words: str, timeout_s: float = 10) -> None:
        """Until the ranks' log, which mlx.launch relays, holds `words`."""
        deadline = time.monotonic() + timeout_s
        while words not in self.log.read_text():
            assert time.monotonic() < deadline, f"no {words!r} in:\n{self.log.read_text()}"
            time.sleep(0.05)

    def wait_log_of_ranks(self, words: str, size: int, timeout_s: float = 10) -> None:
        """Until each of `size` ranks has logged a record with `words`."""
        deadline = time.monotonic() + timeout_s
        while True:
            lines = [line for line in self.log.read_text().splitlines() if words in line]
            if all(any(f'"rank": {rank}, ' in line for line in lines) for rank in range(size)):
                return
            assert time.monotonic() < deadline, f"no {words!r} of {size} ranks in:\n{self.log.read_text()}"
            time.sleep(0.05)

    def wait_end(self) -> list[FromEngine]:
        messages = []
        while (message := self.next()) is not None:
            messages.append(message)
        return messages

    def submit(self, request_id: str, prompt: Sequence[int], max_tokens: int, **options: Any) -> None:
        options = {"sampling": GREEDY, "max_tokens_given": True, "stop_token_ids": []} | options
        self.send(Submit(request_id, list(prompt), max_tokens=max_tokens, **options))

    def cancel(self, request_id: str) -> None:
        self.send(Cancel(request_id))

    def collect(self, *request_ids: str) -> dict[str, list[int]]:
        """The tokens of these requests, when all have ended; an error fails the test."""
        tokens: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
        for output in self.outputs(len(request_ids)):
            assert output.finish_reason != "error", output.error
            tokens[output.request_id] += output.token_ids
        return tokens

    def outputs(self, num_requests: int) -> Iterator[SequenceOutput]:
        """Outputs as they come, until `num_requests` requests have ended."""
        while num_requests:
            message = self.next()
            assert message is not None, self.log.read_text()
            for output in message.outputs if isinstance(message, StepOutput) else []:
                num_requests -= output.finish_reason is not None
                yield output

    def hang_up(self) -> None:
        """What rank 0 sees when the api process dies."""
        self._connection.shutdown(socket.SHUT_RDWR)

    def processes(self) -> list[psutil.Process]:
        """The launcher and all it started."""
        launcher = psutil.Process(self.launcher.pid)
        return [launcher, *launcher.children(recursive=True)]


@contextlib.contextmanager
def running_ring(
    model: str | Path,
    size: int,
    *,
    program: str | None = None,
    root: Path | None = None,
    env: Mapping[str, str] | None = None,
    **keys: Any,
) -> Iterator[RingUnderTest]:
    """A ring of `size` ranks with MODEL_REPO=`model` and further `keys` of the settings, ended at the end.

    `program` replaces `-m server` on every rank, for tests that watch a rank from inside. `root` is the project folder,
    by default one that lasts as long as the ring. `env` is added to the environment.
    """
    folder = Path(tempfile.mkdtemp(prefix="ring-test-"))
    environ = {"MODEL_REPO": str(model), "RING_SIZE": str(size), "RING_PORT": str(free_ports(size))}
    settings = load_config(folder, environ | {key.upper(): str(value) for key, value in keys.items()})
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        listener = socket.socket(socket.AF_UNIX)
        cleanup.callback(listener.close)
        listener.bind(str(folder / "s"))
        listener.listen(1)
        listener.settimeout(60)
        command = ring_command(settings, root=root or folder, socket_path=str(folder / "s"), instance="under-test")
        argv = [*command.argv[:-1], command.argv[-1].replace("-m server", program or "-m server")]
        command.temporary.mkdir()
        log = folder / "log"
        environ = command.env | {"PYTHONPATH": str(ROOT)} | dict(env or {})
        with log.open("wb") as output:
            launcher = subprocess.Popen(
                argv, env=environ, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
            )
        cleanup.callback(_end, launcher)
        connection, _ = listener.accept()
        cleanup.callback(connection.close)
        ring = RingUnderTest(connection, launcher, log)
        ring.send(Configure(PROTOCOL_VERSION, settings.for_ranks()))
        yield ring
        with contextlib.suppress(OSError):
            ring.send(Shutdown())
            launcher.wait(timeout=20)


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Nothing of a test's ring is left, whatever happened to it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(launcher.pid).children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    launcher.kill()
    launcher.wait()
    if launcher.stdin is not None:
        launcher.stdin.close()


def python(*arguments: str, stdin: str = "") -> str:
    """Output of a Python program run with this interpreter, in the project's folder."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
