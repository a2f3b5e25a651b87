"""Keeps a ring running: starts it, starts it again, gives up where that cannot help, ends it in order.

The one owner of the server's state (`starting`, `ready`, `restarting`, `failed`, `stopping`). `api.ring_watch` says
when a ring is lost and `api.restart_policy` what follows; a machine that is away is waited for. It knows nothing of
HTTP. `python -m api` runs it beside the HTTP server; the routes read its state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from api.engine_client import RETRY_AFTER_S, EngineClient
from api.errors import NotReady
from api.reload import TAKES_OVER, digests
from api.restart_policy import RestartPolicy, RingLost
from api.ring_machines import RingMachines, reasons
from api.ring_ports import RingPorts
from api.ring_process import RingProcess, end_ring
from api.ring_watch import STALL_S, Replaced, RingWatch
from api.runtime_files import RING_FILE, write_json
from api.tokenizer import ChatTokenizer
from config import Settings
from config.settings import RING_FIELDS
from distributed.errors import DistributedError, HostAway, ModelError, ModelUnavailable
from distributed.hosts import ring_hosts
from distributed.launch import run_dir
from server.protocol import RankInfo, Ready

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "failed", "stopping"]

END_GRACE_S = 10.0  # for ranks that are asked to end
LOST_GRACE_S = 1.0  # for a ring that nobody can ask; one that was lost mostly ends by itself, with its last words
GOES_BACK = "these settings do not work: the ring from before comes back"
LONGEST_PAUSE_S = 10.0  # between two looks for a machine that is away


class Supervisor:
    def __init__(self, settings: Settings, engine: EngineClient, instance: str) -> None:
        self.state: State = "starting"
        self.detail = "starting the ring"
        self.tokenizer: ChatTokenizer | None = None  # of the first ring that was ready; stays when a ring is lost
        self.num_lost = 0  # rings that were lost while they served
        self.hurry = False  # set by whoever wants `stop` to wait for nobody
        self.machines = RingMachines(instance)
        self.notice = ""  # why the settings of the last `reload` are not those that serve
        self._settings = settings
        self._served_settings: Settings | None = None  # those of the last ring that was ready
        self._asked_settings: Settings | None = None  # those of the next ring
        self._reloads = asyncio.Event()
        self._engine = engine
        self._instance = instance
        self._ports = RingPorts()
        self._ready_since = 0.0  # time.monotonic()
        self._lost_at = 0.0  # time.time()
        self._grace_until = 0.0  # time.monotonic(), once it stops
        self._sockets = self._new_folder()

    # -- for the routes ----------------------------------------------------------------------------------------------

    def accepting(self) -> tuple[ChatTokenizer, Ready]:
        """What a request needs to be accepted. Raises NotReady; a ring that is being restarted is waited for."""
        if self.state in ("ready", "restarting") and self.tokenizer is not None and self._engine.ready is not None:
            return self.tokenizer, self._engine.ready
        raise NotReady(f"The server is {self.state}: {self.detail}", retry_after_s=RETRY_AFTER_S)

    def check_accepting(self, tokenizer: ChatTokenizer) -> None:
        """Raises NotReady where a prompt that `tokenizer` has made in the meantime can no longer be accepted."""
        if self.accepting()[0] is not tokenizer:
            raise _model_changed()

    @property
    def ranks(self) -> Sequence[RankInfo]:
        """The ranks of the ring that serves, as last heard; none where no ring serves."""
        if self._engine.serving_since is None or self._engine.ready is None:
            return []
        return self._engine.stats.ranks if self._engine.stats else self._engine.ready.ranks

    # -- the ring's life ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a ring running until cancelled, or until it is clear that none will."""
        async with asyncio.TaskGroup() as tasks:
            expiring = tasks.create_task(self._expire_requests(), name="expire requests")
            try:
                await self._run_rings()
            finally:
                expiring.cancel()
                self.close()

    async def _run_rings(self) -> None:
        policy = RestartPolicy()
        for folder in self._sockets.parent.glob(f"mlx-ring-{self._instance}-*"):
            if folder != self._sockets:  # of a server of this project that was killed
                shutil.rmtree(folder, ignore_errors=True)
        await self.machines.clear(self._settings)  # a crashed server may have left ranks there
        while True:
            self._take_asked_settings()
            try:
                await self._one_ring()
            except Replaced:
                policy.begin_anew()
                continue
            except RingLost as error:
                lost = error
            except Exception as error:  # the outermost frame of a ring
                logger.exception("an error that nobody expected")
                lost = self._lost(RingLost(f"an error that nobody expected: {_said(error)}"))
            away = await self.machines.clear(self._settings)
            if self._has_others_to_try(lost):  # none can be asked for between here and the decision
                policy.begin_anew()
                continue
            if away and self.tokenizer is not None:
                await self._wait_for_machines(away)
                policy.begin_anew()
                continue
            if lost.has_served and not lost.is_explained and self._engine.blame():
                policy.begin_anew()
            delay_s = policy.seconds_to_next_start(lost)
            if delay_s is None:
                self._give_up(reasons(away) or lost.reason)
                return
            await self._sleep(delay_s)

    async def _sleep(self, delay_s: float) -> None:
        """Or until other settings are asked for."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reloads.wait(), delay_s)

    async def _expire_requests(self) -> None:
        while True:
            looked_at, pause_s = time.monotonic(), self._settings.poll_interval
            await asyncio.sleep(pause_s)
            if time.monotonic() - looked_at <= STALL_S + pause_s:
                self._engine.expire(self.detail)

    def reload(self, settings: Settings, model_path: Path) -> bool:
        """End the ring in order and start one with `settings`; requests go on there.

        False where no ring serves or comes back, or where `model_path`, what MODEL_REPO stands for now, is not the
        model that they came for. Where no ring gets ready, the settings that served before serve again; `notice` says
        why.
        """
        if self.state not in ("ready", "restarting") or self.tokenizer is None:
            return False
        if self.tokenizer.path.resolve() != model_path.resolve() or not self.tokenizer.is_current():
            return False
        self.notice = ""
        self._asked_settings = settings
        self._reloads.set()
        self._enter("restarting", TAKES_OVER)
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
        if not self._may_go_back(lost):
            return False
        assert self._served_settings is not None
        self.notice = (
            f"the settings of the last restart do not work, those from before serve: {lost.reason} (this is said until"
            " the next ./launch.sh restart)"
        )
        logger.error("%s", self.notice)
        self._use(self._served_settings)
        return True

    def _may_go_back(self, lost: RingLost) -> bool:
        """Whether the settings never served, and others did before them."""
        return not lost.has_served and self._served_settings not in (None, self._settings)

    def _use(self, settings: Settings) -> None:
        self._settings = settings
        self._engine.configure(settings.for_ranks())

    async def stop(self) -> None:
        """Take no more requests, let the accepted ones end for SHUTDOWN_GRACE_S, and end those that are left."""
        serving = self.state in ("ready", "restarting")
        self._enter("stopping", "the server is being stopped")
        self._grace_until = time.monotonic() + (self._settings.shutdown_grace_s if serving else 0)
        while self._engine.generations and self.seconds_of_grace:
            await asyncio.sleep(self._settings.poll_interval)
        self._engine.fail_all(NotReady("The server is being stopped.", retry_after_s=RETRY_AFTER_S))

    @property
    def seconds_of_grace(self) -> float:
        """What is left of SHUTDOWN_GRACE_S, once the server stops; nothing where nobody is waited for."""
        return 0.0 if self.hurry else max(0.0, self._grace_until - time.monotonic())

    def close(self) -> None:
        """Removes the folder of the socket, and frees the ring's ports for other servers."""
        self._ports.close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _new_folder(self) -> Path:
        """For a ring's socket; only its owner may enter."""
        return Path(tempfile.mkdtemp(prefix=f"mlx-ring-{self._instance}-"))

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
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._sockets = self._new_folder()  # systems clear temporary folders of what is old, as a server may be
        socket_path = self._sockets / "rank0.sock"
        ring: RingProcess | None = None
        grace_s = LOST_GRACE_S  # a ring that starts does not listen yet
        async with self._engine.listening(socket_path):
            try:
                self._ports.take(await asyncio.to_thread(ring_hosts, self._settings))
                ring = await RingProcess.start(self._settings, socket_path, self._instance)
                self._write_ring_file(ring)
                watch = RingWatch(ring, self._engine, self._settings, self._reloads)
                ready = await watch.until_ready(lambda detail: self._enter(self.state, detail))
                await self._load_tokenizer(ready)
                if self._reloads.is_set():
                    raise Replaced
                self._write_ring_file(ring, ready)
                self._served_settings = self._settings
                self._engine.serve(ready)
                grace_s = END_GRACE_S
                self._ready_since = time.monotonic()
                self._enter("ready", self.notice)
                await watch.until_lost()
            except (OSError, DistributedError, RingLost) as error:
                lost = self._lost(error)
                grace_s = 0.0 if lost.is_wedged else LOST_GRACE_S
                raise lost from error
            finally:
                self._engine.suspend()
                self._engine.shut_down()
                if ring is not None:
                    await _to_its_end(ring.end(grace_s))  # a stop in the middle of it would leave ranks behind

    def _lost(self, error: OSError | DistributedError | RingLost) -> RingLost:
        """Notes that the ring is over, and why."""
        if isinstance(error, RingLost):
            lost = error
        elif isinstance(error, DistributedError):
            permanent = isinstance(error, ModelError) and not isinstance(error, ModelUnavailable)
            lost = RingLost(str(error), permanent=permanent)
        else:
            lost = RingLost(f"it cannot be started: {error}")
        if self.state == "ready" or self._engine.serving_since is not None:  # requests end on a ring while it stops
            lost.served_s = time.monotonic() - self._ready_since
            lost.num_tokens = self._engine.num_tokens
            self.num_lost += 1
        self._lost_at = time.time()
        logger.error("the ring is lost: %s", lost.reason)
        if self._may_go_back(lost):
            self._enter("restarting", GOES_BACK)
        elif self.tokenizer is not None or not lost.permanent:  # else `_give_up` says it in a moment, once
            self._enter("starting" if self.tokenizer is None else "restarting", lost.reason)
        return lost

    async def _wait_for_machines(self, away: Mapping[str, HostAway]) -> None:
        """Until all of them answer, however long that takes, or other settings are asked for."""
        pause_s = 1.0
        while away and not self._reloads.is_set():
            self.machines.miss(away, self._lost_at)
            self._enter("restarting", f"waiting for {reasons(away)}")
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            away = await self.machines.clear(self._settings)
        self.machines.miss({}, self._lost_at)

    async def _load_tokenizer(self, ready: Ready) -> None:
        path = Path(ready.model_path)
        if self.tokenizer is not None and self.tokenizer.path == path and self.tokenizer.is_current():
            return
        self._enter(self.state, "loading the tokenizer")
        try:
            tokenizer = await asyncio.to_thread(ChatTokenizer, path, trust_remote_code=self._settings.trust_remote_code)
        except Exception as error:  # the tokenizers library raises it bare for a damaged tokenizer.json
            raise RingLost(f"{path}: the tokenizer cannot be loaded: {_said(error)}", permanent=True) from error
        if self.tokenizer is not None:
            # Ids of one tokenizer never reach another's model. In one go with the change: what comes before is ended.
            self._engine.fail_all(_model_changed())
        self.tokenizer = tokenizer

    def _write_ring_file(self, ring: RingProcess, ready: Ready | None = None) -> None:
        ranks = [{"rank": rank.rank, "host": rank.host, "pid": rank.pid} for rank in ready.ranks] if ready else []
        path = run_dir(self._settings.project_root) / RING_FILE
        about = {"launcher_pid": ring.pid, "instance": self._instance, "ranks": ranks}
        about["ports"] = self._ports.taken
        try:
            write_json(path, {**about, "keys": digests(self._settings, RING_FIELDS)})
        except OSError as error:  # the commands read it, and no ring needs it: a full disk ends none
            logger.warning("%s cannot be written: %s", path, error.strerror or error)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Awaits it whole, also where whoever awaits is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _model_changed() -> NotReady:
    return NotReady("The model was changed meanwhile.", retry_after_s=RETRY_AFTER_S)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
