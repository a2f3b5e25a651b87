"""start, stop and restart against an api process that is played: what they wait for, how they ask, what they say."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.cli import restart, start, stop
from config import Settings


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.now += 50


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(start, "time", made)
    return made


def test_start_waits_as_long_as_there_is_progress(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def health(*_: Any, **__: Any) -> dict[str, Any]:
        done = clock.now >= 10_000
        return {"status": "ready" if done else "starting", "detail": f"{clock.now // 200} %"}

    monkeypatch.setattr(start, "fetch_health", health)
    assert start.wait_until_ready(tmp_path, Settings(start_timeout=300), lambda: None)["status"] == "ready"


def test_start_gives_up_where_there_is_none(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(start, "fetch_health", lambda *_, **__: {"status": "starting", "detail": "stuck"})
    with pytest.raises(start.StartFailed, match="START_TIMEOUT=300 s; last: stuck"):
        start.wait_until_ready(tmp_path, Settings(start_timeout=300), lambda: None)
    assert clock.now < 500


API = """
import signal
asked = 0
def on_signal(*_):
    global asked
    asked += 1
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, on_signal)
print("ready", flush=True)
while asked < 2:
    signal.pause()
"""


def test_an_api_that_drains_is_asked_twice_where_nobody_waits_for_requests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stop, "API_END_GRACE_S", 5)
    with subprocess.Popen([sys.executable, "-c", API], stdout=subprocess.PIPE) as api:
        assert api.stdout and api.stdout.readline() == b"ready\n"
        stop._end_api(psutil.Process(api.pid), 0.0)
        assert api.wait(5) == 0, "it was killed"


def test_an_api_that_may_drain_is_asked_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(stop, "API_END_GRACE_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", API], stdout=subprocess.PIPE) as api:
        assert api.stdout and api.stdout.readline() == b"ready\n"
        stop._end_api(psutil.Process(api.pid), 0.1)
    assert "killing it" in capsys.readouterr().err


@pytest.mark.parametrize("is_back", [True, False])
def test_a_restart_that_stopped_the_server_for_nothing_says_that_none_runs(
    is_back: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(restart, "find_api", lambda *_: psutil.Process())
    for name in ("check_start", "end_everything"):
        monkeypatch.setattr(restart, name, lambda *_, **__: 0)
    monkeypatch.setattr(restart, "start", lambda _: 0 if is_back else 1)
    assert restart.restart(tmp_path) == (0 if is_back else 1)
    assert ("none runs now: ./launch.sh start" in capsys.readouterr().err) == (not is_back)
