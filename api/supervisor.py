"""Keeps a ring running: starts it, watches it, starts it again, gives up where that cannot help, ends it in order.

The one owner of the server's state (`starting`, `ready`, `restarting`, `failed`, `stopping`). It judges a ring by
rank 0's connection and by completed steps, never by an exit code, and it knows nothing of HTTP. `python -m api` runs it
beside the HTTP server; the routes read its state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

from api.engine_client import RETRY_AFTER_S, EngineClient
from api.errors import NotReady
from api.ports import check_port
from api.ring_process import RingProcess, end_ring
from api.runtime_files import RING_FILE, AlreadyRunning, lock_port, write_json
from api.tokenizer import ChatTokenizer
from config import Settings
from distributed.errors import DistributedError, ModelError, ModelUnavailable
from distributed.hosts import RankHost, ring_hosts
from distributed.launch import run_dir
from server.protocol import Failed, Progress, RankInfo, Ready

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "failed", "stopping"]

MAX_FAILED_STARTS = 3  # of a server that was never ready: its settings are wrong, not its luck
LONGEST_BACKOFF_S = 30.0
STABLE_S = 60.0  # a ring that served so long starts the count of deaths anew
SILENCE_S = 30.0  # rank 0 says something each second
END_GRACE_S = 10.0  # for ranks that are asked to end
LOST_GRACE_S = 2.0  # for what is left of a ring that was lost: it ends by itself, or is wedged


class RingLost(Exception):
    """This ring is over. `permanent`: another one would end the same way."""

    def __init__(self, reason: str, *, permanent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent
        self.served = False  # whether it was ready before


class Replaced(Exception):
    """This ring is to end in favour of one with other settings."""


class Supervisor:
    def __init__(self, settings: Settings, engine: EngineClient, instance: str) -> None:
        self.state: State = "starting"
        self.detail = "starting the ring"
        self.tokenizer: ChatTokenizer | None = None  # of the first ring that was ready; stays when a ring is lost
        self.num_lost = 0  # rings that were lost while they served
        self.hurry = False  # set by whoever wants `stop` to wait for nobody
        self.notice = ""  # why the settings of the last `reload` are not those that serve
        self._settings = settings
        self._served_settings: Settings | None = None  # those of the last ring that was ready
        self._asked_settings: Settings | None = None  # those of the next ring
        self._reloads = asyncio.Event()
        self._engine = engine
        self._instance = instance
        self._port_locks: dict[int, IO[str]] = {}
        self._sockets = Path(tempfile.mkdtemp(prefix="mlx-ring-"))  # only its owner may enter

    # -- for the routes ----------------------------------------------------------------------------------------------

    def accepting(self) -> tuple[ChatTokenizer, Ready]:
        """What a request needs to be accepted. Raises NotReady; a ring that is being restarted is waited for."""
        if self.state in ("ready", "restarting") and self.tokenizer is not None and self._engine.ready is not None:
            return self.tokenizer, self._engine.ready
        raise NotReady(f"The server is {self.state}: {self.detail}", retry_after_s=RETRY_AFTER_S)

    @property
    def ranks(self) -> Sequence[RankInfo]:
        """The ranks of the ring that serves, as last heard; none where no ring serves."""
        if self._engine.serving_since is None or self._engine.ready is None:
            return []
        return self._engine.stats.ranks if self._engine.stats else self._engine.ready.ranks

    # -- the ring's life ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a ring running until cancelled, or until it is clear that none will."""
        failures = 0
        try:
            while True:
                began = time.monotonic()
                self._take_asked_settings()
                try:
                    await self._one_ring()
                except Replaced:
                    failures = 0
                    continue
                except RingLost as error:
                    lost = error
                except Exception as error:  # the outermost frame of a ring
                    logger.exception("an error that nobody expected")
                    lost = self._lost(RingLost(f"an error that nobody expected: {_said(error)}"))
                if self._has_others_to_try(lost):
                    failures = 0
                    continue
                failures = 1 if lost.served and time.monotonic() - began > STABLE_S else failures + 1
                if lost.permanent or (self.tokenizer is None and failures >= MAX_FAILED_STARTS):
                    self._give_up(lost.reason)
                    return
                backoff_s = 0 if lost.served and failures == 1 else min(2.0**failures, LONGEST_BACKOFF_S)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._reloads.wait(), backoff_s)
        finally:
            self.close()

    def reload(self, settings: Settings) -> bool:
        """End the ring in order and start one with `settings`, which go with the tokenizer; requests go on there.

        False where no ring serves or comes back, or where the model's files have changed. Where the ring does not get
        ready, the settings that served before serve again, and `notice` says why.
        """
        if self.state not in ("ready", "restarting") or self.tokenizer is None or not self.tokenizer.is_current():
            return False
        self.notice = ""
        self._asked_settings = settings
        self._reloads.set()
        self._enter("restarting", "a new ring takes over")
        return True

    def _take_asked_settings(self) -> None:
        if self._asked_settings is not None:
            self._use(self._asked_settings)
            self._asked_settings = None
            self._reloads.clear()

    def _has_others_to_try(self, lost: RingLost) -> bool:
        """Whether the next ring has other settings: those asked for, or after them, if they never served, the old."""
        if self._asked_settings is not None:
            return True
        if lost.served or self._served_settings in (None, self._settings):
            return False
        self.notice = f"the settings of the last restart do not work, those from before serve: {lost.reason}"
        logger.error("%s", self.notice)
        self._use(self._served_settings)
        return True

    def _use(self, settings: Settings) -> None:
        self._settings = settings
        self._engine.configure(settings.for_ranks())

    async def stop(self) -> None:
        """Take no more requests, let the accepted ones end for SHUTDOWN_GRACE_S, and end those that are left."""
        serving = self.state in ("ready", "restarting")
        self._enter("stopping", "the server is being stopped")
        deadline = time.monotonic() + (self._settings.shutdown_grace_s if serving else 0)
        while self._engine.generations and time.monotonic() < deadline and not self.hurry:
            await asyncio.sleep(self._settings.poll_interval)
        self._engine.fail_all(NotReady("The server is being stopped.", retry_after_s=RETRY_AFTER_S))

    def close(self) -> None:
        """Removes the folder of the socket, and frees the ring's ports for other servers."""
        while self._port_locks:
            self._port_locks.popitem()[1].close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _enter(self, state: State, detail: str) -> None:
        if self.state != "stopping":  # nothing comes after that
            if state != self.state:
                logger.info("state: %s -> %s (%s)", self.state, state, detail)
            self.state, self.detail = state, detail

    def _give_up(self, reason: str) -> None:
        self._enter("failed", reason)
        logger.critical("giving up: %s", reason)
        self._engine.fail_all(NotReady(f"The server has failed: {reason}"))

    async def _one_ring(self) -> None:
        """One ring from its start to its end. Leaves by an error, RingLost where it was foreseen, or cancelled."""
        await end_ring(self._instance)  # what a crashed server may have left holds the ports
        socket_path = self._sockets / "rank0.sock"
        ring: RingProcess | None = None
        async with self._engine.listening(socket_path):
            try:
                self._take_ports(await asyncio.to_thread(ring_hosts, self._settings))
                ring = await RingProcess.start(self._settings, socket_path, self._instance)
                self._write_ring_file(ring)
                async with asyncio.timeout(self._settings.start_timeout) as start:
                    ready = await self._until_ready(ring, start)
                    await self._load_tokenizer(ready)
                if self._reloads.is_set():
                    raise Replaced
                ring.stop_spinning()
                self._write_ring_file(ring, ready)
                self._served_settings = self._settings
                self._engine.serve(ready)
                self._enter("ready", self.notice)
                await self._until_lost(ring)
            except (OSError, DistributedError, RingLost) as error:
                raise self._lost(error) from error
            finally:
                is_asked = self.state == "stopping" or self._reloads.is_set()
                self._engine.suspend(lost=not is_asked)
                self._engine.shut_down()
                if ring is not None:
                    await ring.end(END_GRACE_S if is_asked else LOST_GRACE_S)

    def _take_ports(self, hosts: Sequence[RankHost]) -> None:
        """Raises RingLost where a ring port of this machine is another server's, or another program's."""
        local = local_ports(hosts)
        for port in self._port_locks.keys() - {port for _, port in local}:
            self._port_locks.pop(port).close()
        for _, port in local:
            if port not in self._port_locks:
                try:
                    self._port_locks[port] = lock_port(port)
                except AlreadyRunning as error:
                    raise RingLost(f"{error}: set RING_PORT to the first of free ports") from error
        check_ports(local)

    def _lost(self, error: OSError | DistributedError | RingLost) -> RingLost:
        """Notes that the ring is over, and why."""
        if isinstance(error, RingLost):
            lost = error
        elif isinstance(error, DistributedError):
            permanent = isinstance(error, ModelError) and not isinstance(error, ModelUnavailable)
            lost = RingLost(str(error), permanent=permanent)
        elif isinstance(error, TimeoutError):
            seconds = f"{self._settings.start_timeout:g}"
            lost = RingLost(f"its start made no progress for START_TIMEOUT={seconds} s; last: {self.detail}")
        else:
            lost = RingLost(f"it cannot be started: {error}")
        lost.served = self.state == "ready"
        self.num_lost += lost.served
        logger.error("the ring is lost: %s", lost.reason)
        self._enter("starting" if self.tokenizer is None else "restarting", lost.reason)
        return lost

    async def _until_ready(self, ring: RingProcess, start: asyncio.Timeout) -> Ready:
        """Whatever is new gives the start START_TIMEOUT again: a large model may take hours to download."""
        while True:
            event = await self._next_event(ring)
            if isinstance(event, Ready):
                return event
            if event is None:
                continue
            ring.stop_spinning()  # the ring is formed, so no rank reads its stdin any more; loading wants the core
            if event.detail != self.detail:
                logger.info("%s", event.detail)
                self._enter(self.state, event.detail)
                start.reschedule(asyncio.get_running_loop().time() + self._settings.start_timeout)

    async def _until_lost(self, ring: RingProcess) -> None:
        while True:
            await self._next_event(ring)
            self._engine.expire()
            stuck_s = self._engine.seconds_without_step()
            if stuck_s > self._settings.step_timeout:
                raise RingLost(f"it has work and completed no step for {stuck_s:.0f} s (STEP_TIMEOUT)")
            if time.monotonic() - self._engine.last_message_at > SILENCE_S:
                raise RingLost(f"rank 0 was silent for {SILENCE_S:.0f} s")

    async def _next_event(self, ring: RingProcess) -> Progress | Ready | None:
        """What rank 0 said next, None after POLL_INTERVAL without a word. Raises RingLost where the ring is over, and
        Replaced where another one is asked for."""
        if self._reloads.is_set():
            raise Replaced
        try:
            async with asyncio.timeout(self._settings.poll_interval):
                event = await self._engine.life.get()
        except TimeoutError:
            if ring.has_exited:
                raise RingLost(_last_words("mlx.launch ended", ring)) from None
            return None
        if isinstance(event, Failed):
            raise RingLost(event.message, permanent=event.permanent)
        if event is None:
            raise RingLost(_last_words("rank 0 is gone", ring))
        return event

    async def _load_tokenizer(self, ready: Ready) -> None:
        path = Path(ready.model_path)
        if self.tokenizer is not None:
            if self.tokenizer.path == path and self.tokenizer.is_current():
                return
            # Ids of one tokenizer never reach another's model.
            self._engine.fail_all(NotReady("The model was changed meanwhile.", retry_after_s=RETRY_AFTER_S))
        self._enter(self.state, "loading the tokenizer")
        try:
            self.tokenizer = await asyncio.to_thread(
                ChatTokenizer, path, trust_remote_code=self._settings.trust_remote_code
            )
        except Exception as error:  # the tokenizers library raises it bare for a damaged tokenizer.json
            raise RingLost(f"{path}: the tokenizer cannot be loaded: {_said(error)}", permanent=True) from error

    def _write_ring_file(self, ring: RingProcess, ready: Ready | None = None) -> None:
        ranks = [{"rank": rank.rank, "host": rank.host, "pid": rank.pid} for rank in ready.ranks] if ready else []
        path = run_dir(self._settings.project_root) / RING_FILE
        write_json(path, {"launcher_pid": ring.pid, "instance": self._instance, "ranks": ranks})


def local_ports(hosts: Sequence[RankHost]) -> list[tuple[str, int]]:
    """Address and port wherever a rank of this machine listens; a ring of one listens nowhere."""
    ranks = [host for host in hosts if host.is_local] if len(hosts) > 1 else []
    return [pair for rank in ranks for pair in zip(rank.addresses, rank.ports, strict=True)]


def check_ports(ports: Sequence[tuple[str, int]]) -> None:
    """Raises RingLost where something listens: MLX would share the port with it in silence."""
    for address, port in ports:
        try:
            check_port(address, port)
        except OSError as error:
            raise RingLost(
                f"ring port {port} on {address} cannot be used ({error.strerror}): end what uses it, or set "
                "RING_PORT to the first of free ports"
            ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _last_words(what: str, ring: RingProcess) -> str:
    last = next((line for line in reversed(ring.last_lines) if line), "it printed nothing")
    return f"{what}; its last line: {last[:500]}"
