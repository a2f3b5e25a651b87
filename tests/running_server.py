"""A real server for tests: `python -m api` with its ring, in a project folder of its own.

The folder holds links to our packages, so its .env, .run, models and server.log are not the real ones; ports are free
ones. Used through the fixture `running_server`, or directly by tests that break the server.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import httpx
from openai import AsyncOpenAI, OpenAI

from tests.ports import free_ports

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("api", "config", "distributed", "server")
READY_S = 120.0
END_S = 40.0


class RunningServer:
    started: ClassVar[list[RunningServer]] = []  # and not yet stopped

    def __init__(self, root: Path, environ: Mapping[str, str]) -> None:
        """`environ`: keys of the configuration, besides the ports."""
        root.mkdir(parents=True)
        for package in PACKAGES:
            (root / package).symlink_to(PROJECT / package)
        self.root = root
        self.api_port = free_ports(1)
        # Ring ports are consecutive, one a rank.
        ring_port = free_ports(8)
        inherited = {key: value for key, value in os.environ.items() if key not in environ}
        self.environ = {
            **inherited,
            "MLX_RING_ROOT": str(root),
            "API_PORT": str(self.api_port),
            "RING_PORT": str(ring_port),
            "START_TIMEOUT": "90",
            "KV_CACHE_RESERVED_MEMORY_MB": "64",
            **environ,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: dict[str, OpenAI] = {}

    # -- its life ----------------------------------------------------------------------------------------------------

    def start(self, *, wait: bool = True, own_group: bool = False) -> None:
        """Start it; with `wait` until it is ready. AssertionError with the log where it does not get ready.

        `own_group`: its processes are a group, as those of a command in a terminal are.
        """
        with (self.root / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api"],
                cwd=self.root,
                env=self.environ,
                stdout=output,
                stderr=output,
                process_group=0 if own_group else None,
            )
        RunningServer.started.append(self)
        if wait:
            self.wait_until(lambda health: health.get("status") == "ready", "ready")

    def wait_until(self, holds: Any, what: str, timeout_s: float = READY_S) -> dict[str, Any]:
        """The first /health for which `holds`; {} stands for no answer yet."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            health = self.health()
            if holds(health):
                return health
            assert self.process is not None
            ended = self.process.poll()
            if ended is not None or health.get("status") == "failed":
                raise AssertionError(f"not {what}; exit code {ended}, /health: {health}\n{self.log()}")
            time.sleep(0.05)
        raise AssertionError(f"not {what} in {timeout_s:.0f} s; /health: {self.health()}\n{self.log()}")

    def stop(self) -> int:
        """SIGTERM; returns the exit code. AssertionError where it does not end or leaves a process behind."""
        assert self.process is not None
        self.close_clients()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the server did not end in {END_S:.0f} s:\n{self.log()}") from None
        finally:
            if self in RunningServer.started:
                RunningServer.started.remove(self)
        return code

    def kill(self) -> None:
        """SIGKILL to the api process, as a crash would end it; its ring must end by itself."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        RunningServer.started.remove(self)

    def close_clients(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    # -- talking to it -----------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def model(self) -> str:
        return self.environ.get("MODEL_NAME") or self.environ["MODEL_REPO"]

    def client(self, *, api_key: str = "none") -> OpenAI:
        """OpenAI's SDK, without its retries: a test must see the first answer. Closed when the server is stopped."""
        if api_key not in self._clients:
            base_url = f"{self.url}/v1"
            self._clients[api_key] = OpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=120)
        return self._clients[api_key]

    def async_client(self) -> AsyncOpenAI:
        """The same for asyncio; to be used in an `async with`."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def health(self) -> dict[str, Any]:
        """What /health says, {} where nothing listens."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10).json()
        except httpx.HTTPError:
            return {}

    def log(self) -> str:
        """server.log and what the process printed."""
        files = [self.root / "server.log", self.root / "output.txt"]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())
