import asyncio
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.engine_client import EngineClient
from api.errors import NotReady
from api.generation import Generation
from api.restart_policy import RingLost
from api.ring_ports import check_ports, local_ports
from api.ring_watch import Replaced
from api.supervisor import GOES_BACK, LONGEST_PAUSE_S, LOST_GRACE_S, Supervisor
from api.tokenizer import ChatTokenizer
from config import Settings
from distributed.errors import HostAway, ModelError, ModelUnavailable, RingError
from distributed.hosts import RankHost
from server.protocol import Failed, SamplingParams
from tests.api.fake_engine import READY, FakeEngine
from tests.ports import free_ports


@pytest.fixture
def supervisor(tmp_path: Path) -> Any:
    """Whose ring never runs. Any: the tests put scripted parts into it."""
    engine = EngineClient({}, max_queued_requests=1, request_timeout_s=1)
    made = Supervisor(Settings(project_root=tmp_path, start_timeout=7), engine, "test")
    yield made
    made.close()


def host(rank: int, *ports: int, ssh: str | None = None) -> RankHost:
    return RankHost(rank, ssh, ("127.0.0.1",) * len(ports), ports)


def test_a_taken_ring_port_is_named():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as MLX's ring does, which would hide the clash
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RingError, match=rf"ring port {port} on 127.0.0.1 .*: process {os.getpid()}, "):
            check_ports([("127.0.0.1", free_ports(1)), ("127.0.0.1", port)])


def test_free_ring_ports_are_fine():
    check_ports([("127.0.0.1", free_ports(1))])


def test_only_the_ports_of_this_machine_s_ranks_are_ours_to_check():
    hosts = [host(0, 5000, 5001), host(1, 5002, ssh="elsewhere"), host(2, 5003)]
    assert [port for _, port in local_ports(hosts)] == [5000, 5001, 5003]
    assert local_ports([host(0, 5000)]) == []  # a ring of one listens nowhere


def test_a_listener_on_all_addresses_has_the_port_of_each():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        with pytest.raises(RingError):
            check_ports([("127.0.0.1", other.getsockname()[1])])


def test_nothing_is_accepted_before_a_ring_was_ready(supervisor: Any):
    with pytest.raises(NotReady, match="The server is starting") as raised:
        supervisor.accepting()
    assert raised.value.retry_after_s
    assert list(supervisor.ranks) == []


def test_a_process_that_was_held_up_reads_what_the_ring_said_before_it_ends_requests(
    supervisor: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("api.supervisor.STALL_S", 0.1)
    looks: list[str] = []
    supervisor._engine.expire = looks.append

    async def test() -> None:
        expiring = asyncio.create_task(supervisor._expire_requests())
        await asyncio.sleep(0)
        time.sleep(0.5)  # as SIGSTOP, or a machine that sleeps
        for _ in range(3):
            await asyncio.sleep(0)
        assert not looks
        async with asyncio.timeout(5):
            while not looks:
                await asyncio.sleep(0.01)
        expiring.cancel()

    asyncio.run(test())


def test_an_error_nobody_expected_is_a_lost_ring_and_not_the_end_of_the_server(
    supervisor: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def one_ring() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(supervisor, "_one_ring", one_ring)
    monkeypatch.setattr("api.restart_policy.LONGEST_BACKOFF_S", 0)
    asyncio.run(supervisor.run())
    assert supervisor.state == "failed" and "KeyError: 'a bug'" in supervisor.detail
    assert "Traceback" in caplog.text


def test_asked_settings_are_the_next_ring_s_and_those_that_served_come_back_where_it_never_gets_ready(
    supervisor: Any, tmp_path: Path, tiny_chat_model: Path
):
    """Rings are scripted: what each was started with, and how it ended."""
    old, new = supervisor._settings, Settings(project_root=tmp_path, ring_size=3)
    started: list[tuple[int, int]] = []

    async def one_ring() -> None:
        started.append((supervisor._settings.ring_size, supervisor._engine._link.rank_settings.get("ring_size")))
        if supervisor._settings is new:
            raise supervisor._lost(RingLost("no such layer", permanent=True))
        if len(started) > 1:
            assert supervisor.detail == GOES_BACK, "nobody takes this ring for another try of the new settings"
            raise asyncio.CancelledError
        supervisor._served_settings, supervisor.state = old, "ready"
        supervisor.tokenizer = ChatTokenizer(tiny_chat_model)
        assert supervisor.reload(new, tiny_chat_model)
        assert supervisor.state == "restarting"
        assert supervisor._reloads.is_set()
        raise Replaced

    supervisor._one_ring = one_ring
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(supervisor.run())
    assert started == [(2, None), (3, 3), (2, 2)]
    assert "those from before serve: no such layer" in supervisor.notice
    assert supervisor.num_lost == 0


class Launcher:
    """Of a ring that is elsewhere: it only says how it was ended."""

    pid, has_exited, last_lines = 1, False, ()

    def __init__(self) -> None:
        self.grace_s = 0.0
        self.has_ended = False
        self.may_end = asyncio.Event()

    def stop_spinning(self) -> None:
        pass

    async def end(self, grace_s: float) -> None:
        self.grace_s = grace_s
        await self.may_end.wait()
        self.has_ended = True


@pytest.fixture
def launcher(supervisor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """That of the supervisor's next ring."""
    made = Launcher()

    async def start(*_: Any) -> Launcher:
        return made

    monkeypatch.setattr("api.supervisor.RingProcess.start", start)
    (tmp_path / ".run").mkdir()
    supervisor._settings = Settings(project_root=tmp_path, ring_size=1)
    return made


async def ring_that_is_lost(supervisor: Any, launcher: Launcher) -> asyncio.Task[None]:
    """One that is about to be ended."""
    ring = asyncio.create_task(supervisor._one_ring())
    async with asyncio.timeout(5):
        while not (socket_path := supervisor._sockets / "rank0.sock").exists():
            await asyncio.sleep(0.01)
        engine = await FakeEngine.connect(socket_path)
        engine.send(Failed("rank 1 is lost", permanent=False))
        while not launcher.grace_s:
            await asyncio.sleep(0.01)
        await engine.leave()
    return ring


def test_a_ring_that_is_lost_while_the_server_stops_takes_no_time_from_those_that_wait(
    supervisor: Any, launcher: Launcher
):
    async def test() -> None:
        supervisor.state = "stopping"
        ring = await ring_that_is_lost(supervisor, launcher)
        assert launcher.grace_s == LOST_GRACE_S
        launcher.may_end.set()
        with pytest.raises(RingLost, match="rank 1 is lost"):
            await ring

    asyncio.run(test())


def test_a_ring_that_still_starts_is_given_no_time_to_hear_that_it_should_end(
    supervisor: Any, launcher: Launcher, tmp_path: Path
):
    async def test() -> None:
        ring = asyncio.create_task(supervisor._one_ring())
        async with asyncio.timeout(5):
            while not (tmp_path / ".run" / "ring.json").exists():
                await asyncio.sleep(0.01)
            ring.cancel()
            while not launcher.grace_s:
                await asyncio.sleep(0.01)
        assert launcher.grace_s == LOST_GRACE_S
        launcher.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await ring

    asyncio.run(test())


def test_no_ring_is_lost_where_what_it_leaves_for_the_commands_cannot_be_written(
    supervisor: Any, caplog: pytest.LogCaptureFixture
):
    """As on a full disk; here there is no folder for it."""
    supervisor._write_ring_file(Launcher(), READY)
    assert "ring.json cannot be written" in caplog.text


def test_a_ring_that_serves_while_the_server_stops_has_served(supervisor: Any):
    """So what kills it is looked for, and the next one comes at once."""
    supervisor._engine.serve(READY)
    supervisor.state = "stopping"
    assert supervisor._lost(RingLost("rank 1 is lost")).has_served
    supervisor._engine.suspend()
    assert not supervisor._lost(RingLost("rank 1 did not come")).has_served


def test_who_waits_for_nobody_gives_no_grace_whenever_it_is_said(supervisor: Any):
    supervisor.state = "ready"
    asyncio.run(supervisor.stop())
    assert supervisor.seconds_of_grace > 0
    supervisor.hurry = True  # by a signal that comes while the ring is being ended
    assert not supervisor.seconds_of_grace


def test_a_stop_while_a_lost_ring_is_being_ended_leaves_nothing_of_it(supervisor: Any, launcher: Launcher):
    async def test() -> None:
        ring = await ring_that_is_lost(supervisor, launcher)
        ring.cancel()
        await asyncio.sleep(0)
        launcher.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await ring
        assert launcher.has_ended

    asyncio.run(test())


class Script:
    """Rings that end as they are told, and machines that are away when told."""

    def __init__(self, supervisor: Any, ends: list[RingLost], away: list[dict[str, HostAway]]) -> None:
        self.slept: list[float] = []
        self.seen: list[tuple[str, str, list[str]]] = []  # state, detail and machines waited for, at each sleep
        self.blamed = 0
        self._supervisor = supervisor
        self._ends, self._away = ends, [{}, *away]  # looked for before the first ring as well
        supervisor._one_ring, supervisor.machines.clear, supervisor._sleep = self._one_ring, self._look, self._sleep
        supervisor._engine.blame = self._blame

    async def _one_ring(self) -> None:
        if not self._ends:
            raise asyncio.CancelledError
        raise self._ends.pop(0)

    async def _look(self, _: Settings) -> dict[str, HostAway]:
        return self._away.pop(0) if self._away else {}

    async def _sleep(self, delay_s: float) -> None:
        waiting = [absence.host for absence in self._supervisor.machines.missed]
        self.seen.append((self._supervisor.state, self._supervisor.detail, waiting))
        self.slept.append(delay_s)

    def _blame(self) -> bool:
        self.blamed += 1
        return False


def lost_while_serving(*, is_explained: bool = False) -> RingLost:
    lost = RingLost("rank 1 is lost", is_explained=is_explained)
    lost.served_s, lost.num_tokens = 5.0, 5
    return lost


def test_a_machine_that_is_away_is_named_and_waited_for_and_blames_no_request(supervisor: Any, tiny_chat_model: Path):
    supervisor.state, supervisor.tokenizer = "ready", ChatTokenizer(tiny_chat_model)
    away = {"mac2": HostAway("mac2: it does not answer")}
    script = Script(supervisor, [lost_while_serving()], [away] * 40)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(supervisor.run())
    assert script.seen == [("restarting", "waiting for mac2: it does not answer", ["mac2"])] * 40
    assert script.slept[:5] == [1, 2, 4, 8, LONGEST_PAUSE_S] and script.slept[-1] == LONGEST_PAUSE_S
    assert supervisor.machines.missed == [] and script.blamed == 0


def test_a_reason_to_give_up_is_not_told_as_a_step_of_the_start_before(supervisor: Any):
    step = supervisor.detail
    supervisor._lost(RingLost("no request fits", permanent=True))
    assert supervisor.detail == step
    supervisor._lost(RingLost("rank 1 did not come"))
    assert supervisor.detail == "rank 1 did not come"


def test_a_machine_that_was_never_there_is_the_reason_why_the_start_fails(supervisor: Any):
    away = {"mac2": HostAway("mac2: it does not answer")}
    Script(supervisor, [RingLost("rank 0 is gone")] * 3, [away] * 3)
    asyncio.run(supervisor.run())
    assert (supervisor.state, supervisor.detail) == ("failed", "mac2: it does not answer")


@pytest.mark.parametrize(("is_explained", "num_blamed"), [(False, 2), (True, 0)])
def test_only_deaths_that_nobody_can_explain_blame_requests(supervisor: Any, is_explained: bool, num_blamed: int):
    ends = [lost_while_serving(is_explained=is_explained)] * 2
    script = Script(supervisor, [*ends, RingLost("it does not start")], [])
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(supervisor.run())
    assert script.blamed == num_blamed


def test_settings_that_are_asked_for_while_a_lost_ring_is_cleared_away_are_tried_before_it_is_given_up(
    supervisor: Any, tiny_chat_model: Path, tmp_path: Path
):
    supervisor.state, supervisor.tokenizer = "ready", ChatTokenizer(tiny_chat_model)
    new = Settings(project_root=tmp_path, ring_size=3)
    Script(supervisor, [RingLost("a layer is missing", permanent=True)], [])
    looks = iter([lambda: True, lambda: supervisor.reload(new, tiny_chat_model)])

    async def look(_: Settings) -> dict[str, HostAway]:
        assert next(looks)()
        return {}

    supervisor.machines.clear = look
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(supervisor.run())
    assert supervisor._settings is new


@pytest.mark.parametrize("state", ["starting", "failed", "stopping"])
def test_nothing_is_reloaded_where_no_ring_serves_or_comes_back(supervisor: Any, state: str, tmp_path: Path):
    supervisor.state = state
    assert not supervisor.reload(supervisor._settings, tmp_path)
    assert supervisor.state == state


def test_ids_of_one_tokenizer_never_reach_another(supervisor: Any, tiny_chat_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_chat_model, tmp_path / "model"))
    ready = msgspec.structs.replace(READY, model_path=str(folder))
    accepted = Generation([1], SamplingParams(seed=1), max_tokens=1, max_tokens_given=True, stop_token_ids=[])

    async def test() -> None:
        await supervisor._load_tokenizer(ready)
        supervisor.state = "ready"
        first = supervisor.tokenizer
        supervisor._engine.submit(accepted)
        await supervisor._load_tokenizer(ready)
        assert supervisor.tokenizer is first and supervisor._engine.generations
        assert not supervisor.reload(supervisor._settings, tiny_chat_model), "another folder"
        (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
        assert not supervisor.reload(supervisor._settings, folder)
        await supervisor._load_tokenizer(ready)
        assert supervisor.tokenizer is not first and not supervisor._engine.generations
        with pytest.raises(NotReady, match="model was changed"):
            await anext(accepted.outputs())

    asyncio.run(test())


def test_what_is_accepted_while_another_tokenizer_is_loaded_never_reaches_its_model(
    supervisor: Any, tiny_chat_model: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(tiny_chat_model, tmp_path / "model"))
    ready = msgspec.structs.replace(READY, model_path=str(folder))
    late = Generation([1], SamplingParams(seed=1), max_tokens=1, max_tokens_given=True, stop_token_ids=[])

    async def test() -> None:
        first = supervisor.tokenizer = ChatTokenizer(tiny_chat_model)
        supervisor.state, supervisor._engine.ready = "restarting", READY
        loading = asyncio.create_task(supervisor._load_tokenizer(ready))
        await asyncio.sleep(0)
        assert not loading.done() and supervisor.accepting()[0] is first
        supervisor._engine.submit(late)
        await loading
        with pytest.raises(NotReady, match="model was changed"):
            supervisor.check_accepting(first)  # whose prompt was still being made
        supervisor.check_accepting(supervisor.tokenizer)
        with pytest.raises(NotReady, match="model was changed"):
            await anext(late.outputs())

    asyncio.run(test())


def test_a_model_that_is_wrong_stays_wrong_and_a_network_recovers(supervisor: Any):
    assert supervisor._lost(ModelError("no such model")).permanent
    assert not supervisor._lost(ModelUnavailable("no network")).permanent


@pytest.mark.parametrize(
    "damage", [lambda _: "{", lambda text: text.replace('"BPE"', '"XYZ"'), lambda _: "{}"], ids=["cut", "kind", "empty"]
)
def test_a_damaged_tokenizer_is_said_and_not_tried_again(
    supervisor: Any, tiny_chat_model: Path, tmp_path: Path, damage: Callable[[str], str]
):
    folder = Path(shutil.copytree(tiny_chat_model, tmp_path / "damaged"))
    (folder / "tokenizer.json").write_text(damage((folder / "tokenizer.json").read_text()))
    ready = msgspec.structs.replace(READY, model_path=str(folder))
    with pytest.raises(RingLost, match="damaged: the tokenizer cannot be loaded") as raised:
        asyncio.run(supervisor._load_tokenizer(ready))
    assert raised.value.permanent
