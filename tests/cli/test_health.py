import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from api.cli.health import absence_line, base_url, fetch_health, format_bytes, rank_lines
from api.cli.progress import Progress
from api.cli.start import StartFailed, ready_lines, wait_until_ready
from api.cli.status import status_lines
from config import Settings, load_config

RANK = {
    "rank": 0,
    "host": "mac1",
    "pid": 7,
    "layers": [0, 15],
    "memory_bytes": 3 * 2**30,
    "kv_cache_bytes": 0,
    "kv_cache_bytes_limit": 2**31,
}
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"
CUT_503 = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 100\r\n\r\n{"
NOT_OURS = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8100"), ("0.0.0.0", "http://127.0.0.1:8100"), ("::", "http://[::1]:8100")],
)
def test_the_url_is_one_that_works_on_this_machine(host: str, url: str):
    assert base_url(Settings(api_host=host)) == url


def test_sizes_are_readable():
    assert [format_bytes(size) for size in (0, 2047, 5 * 2**20, 3 * 2**30)] == ["0 B", "2 KiB", "5 MiB", "3.0 GiB"]


def test_each_rank_is_a_row_under_its_heading():
    heading, row = rank_lines([RANK])
    assert heading.split()[:4] == ["rank", "host", "pid", "layers"]
    assert row.split() == ["0", "mac1", "7", "[0,", "15)", "3.0", "GiB", "0", "B", "2.0", "GiB", "-"]
    assert rank_lines([]) == []


def test_a_rank_s_row_ends_with_how_busy_it_was_while_there_was_work():
    counters = {"busy_s": 9.0, "idle_s": 1000.0, "bubble_s": 3.0}
    heading, row = rank_lines([RANK | {"counters": counters}])
    assert (heading.split()[-1], row.split()[-1]) == ("busy", "75%")


def test_nothing_that_answers_is_no_health():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert fetch_health(Settings(api_port=port)) is None


def test_the_curl_line_asks_for_a_key_only_where_one_is_needed_and_shows_none(tmp_path: Path):
    health: dict[str, Any] = {"ranks": [RANK]}
    assert "Authorization" not in "\n".join(ready_lines(Settings(), health))
    lines = "\n".join(ready_lines(load_config(tmp_path, {"API_KEYS": "me:sk-secret"}), health))
    assert "Bearer $SERVER_KEY" in lines and "sk-secret" not in lines


@pytest.mark.parametrize(("host", "is_open"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False)])
def test_a_server_that_lets_other_machines_in_is_said_to_and_where_they_find_it(
    host: str, is_open: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("api.cli.health.own_address_towards", lambda _: "10.1.2.3")  # a test machine may have none
    lines = ready_lines(Settings(api_host=host), {})
    assert any("http://10.1.2.3:8100/v1" in line for line in lines) == is_open
    assert any("warning: " in line and "API_KEYS" in line for line in lines) == is_open
    with_key = ready_lines(load_config(tmp_path, {"API_KEYS": "me:sk-secret", "API_HOST": host}), {})
    assert not any("warning: " in line for line in with_key)


def test_the_variable_of_the_curl_line_is_no_near_miss_of_a_key(tmp_path: Path):
    lines = "\n".join(ready_lines(load_config(tmp_path, {"API_KEYS": "me:sk-secret"}), {}))
    name = lines.split("Bearer $")[1].split('"')[0]
    assert load_config(tmp_path, {name: "sk-secret"}).api_keys == ()


def test_status_tells_what_the_cache_could_hold_and_claims_nothing_that_it_was_not_told():
    health: dict[str, Any] = {"status": "ready", "model": "m", "uptime_s": 3}
    assert "requests" not in "\n".join(status_lines(health, "http://here", 7))
    full = health | {"requests": {"running": 1, "waiting": 2}, "max_sequence_length": 100, "kv_cache_tokens": 45056}
    assert "  limits    100 tokens a request; the KV cache has room for 45,056 tokens" in status_lines(full, "x", 7)


def test_what_was_said_is_not_said_again(capsys: pytest.CaptureFixture[str]):
    progress = Progress("a new ring takes over")
    for text in ("a new ring takes over", "loading", "loading"):
        progress.show(text)
    assert capsys.readouterr().out == "loading\n"


def test_status_says_since_when_a_machine_is_away():
    since = datetime.now(UTC) - timedelta(minutes=2)
    line = absence_line({"host": "mac2", "since": since.isoformat(timespec="seconds"), "reason": "it is off"})
    assert line.startswith(f"waits     for mac2 since {since.astimezone():%Y-%m-%d %H:%M:%S} (0:02:0")


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", CUT, CUT_503, NOT_OURS], ids=["ssh", "nothing", "cut", "cut 503", "list"]
)
def test_an_answer_that_is_none_of_ours_is_no_answer(said: bytes):
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        assert fetch_health(Settings(api_port=listener.getsockname()[1])) is None
        thread.join()


def test_the_end_of_an_api_that_was_started_by_hand_is_told_without_what_it_printed(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        settings = Settings(api_port=unused.getsockname()[1])
        with pytest.raises(StartFailed, match="ended with code -1"):
            wait_until_ready(tmp_path, settings, lambda: -1)
