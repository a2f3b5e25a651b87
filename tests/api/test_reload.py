"""Who may be asked to start another ring, and what is asked and answered, with an api process that is played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from api import reload
from api.reload import ask, basis, confirm, differences, digests, may_ask, read_asked
from api.runtime_files import API_FILE, RELOAD_FILE, RING_FILE, write_json
from config import Settings
from config.settings import PROCESS_FIELDS, RING_FIELDS

MODEL = Path("/models/m")

API = """
import pathlib, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: pathlib.Path(sys.argv[1]).unlink() if len(sys.argv) > 1 else None)
print("ready", flush=True)
while True:
    signal.pause()
"""


def settings(**keys: Any) -> Settings:
    return Settings.from_ranks(keys)


@contextmanager
def played_api(*arguments: str) -> Iterator[psutil.Process]:
    """It takes away the file that is its argument, or ignores what it is asked."""
    with subprocess.Popen([sys.executable, "-c", API, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("keys", "is_same"),
    [
        ({"ring_size": 3, "layer_split": [2, 1, 1], "kv_cache_bits": 8, "config_file": "other.json"}, True),
        ({"model_repo": "other", "model_name": "m"}, False),
        ({"api_keys": "a:one"}, False),
        ({"default_max_tokens": 5}, False),
        ({"passthrough_env": {"HF_TOKEN": "t"}}, False),
    ],
)
def test_a_process_may_go_on_where_only_the_ring_s_settings_change(keys: dict[str, Any], is_same: bool):
    before = settings(model_name="m")
    after = before.model_copy(update={name: getattr(settings(**keys), name) for name in keys})
    assert (basis(before, {}) == basis(after, {})) == is_same


def test_other_programs_variables_count_and_a_shell_s_own_do_not():
    plain = basis(settings(), {"HOME": "/a", "TERM": "x"})
    assert plain == basis(settings(), {"HOME": "/b"})
    assert plain != basis(settings(), {"MLX_METAL_DEBUG": "1"})
    # What .env sets is in the environment of the process that was started with it.
    assert basis(settings(passthrough_env={"HF_HOME": "/h"}), {}) == basis(settings(), {"HF_HOME": "/h"})


def test_keys_are_told_apart_and_not_shown(tmp_path: Path):
    one, two = (settings(api_keys=f"a:{key}") for key in ("secret-1", "secret-2"))
    assert basis(one, {}) != basis(two, {})
    write_json(tmp_path / API_FILE, {"basis": basis(one, {})})
    assert "secret" not in (tmp_path / API_FILE).read_text()
    assert (tmp_path / API_FILE).stat().st_mode & 0o077 == 0


def test_the_keys_that_differ_from_what_runs_are_named(tmp_path: Path):
    held = settings(api_keys="a:secret")
    me = psutil.Process()
    assert differences(tmp_path, me, settings(ring_size=3)) == [], "it has not said what it has"
    write_json(tmp_path / API_FILE, {"pid": me.pid, "keys": digests(held, PROCESS_FIELDS)})
    write_json(tmp_path / RING_FILE, {"keys": digests(held, RING_FIELDS)})
    assert "secret" not in (tmp_path / API_FILE).read_text()
    assert differences(tmp_path, me, held) == []
    now = settings(api_keys="a:other", ring_size=3, log_level="DEBUG")
    assert differences(tmp_path, me, now) == ["API_KEYS", "LOG_LEVEL", "RING_SIZE"]
    write_json(tmp_path / API_FILE, {"pid": me.pid + 1, "keys": digests(held, PROCESS_FIELDS)})
    assert differences(tmp_path, me, now) == [], "another process wrote that"


@pytest.mark.parametrize(
    ("about", "may"),
    [
        (lambda pid: {"pid": pid, "basis": "b"}, True),
        (lambda pid: {"pid": pid, "basis": "other"}, False),
        (lambda pid: {"pid": pid}, False),  # of a version that would die of the signal
        (lambda pid: {"pid": pid + 1, "basis": "b"}, False),
    ],
)
def test_only_the_process_that_wrote_the_file_is_asked(
    tmp_path: Path, about: Callable[[int], dict[str, Any]], may: bool
):
    assert not may_ask(tmp_path, psutil.Process(), "b")
    write_json(tmp_path / API_FILE, about(os.getpid()))
    assert may_ask(tmp_path, psutil.Process(), "b") == may


def test_what_is_asked_arrives_and_what_the_process_holds_stays(tmp_path: Path):
    held = settings(model_repo="m", ring_size=2, hostfile="/h.json")
    asked = settings(model_repo="other", ring_size=3, rank_memory_limit_mb=[100], request_timeout=5)
    seen: list[tuple[Settings, Path] | None] = []

    class Process:
        def send_signal(self, _: int) -> None:
            seen.append(read_asked(tmp_path, held))
            confirm(tmp_path)

    process: Any = Process()
    assert ask(tmp_path, process, asked, MODEL)
    (taken,) = seen
    assert taken is not None and taken[1] == MODEL
    new = taken[0]
    assert (new.ring_size, new.rank_memory_limit_mb, new.hostfile) == (3, (100,), "")
    assert (new.model_repo, new.request_timeout) == (held.model_repo, held.request_timeout)
    assert read_asked(tmp_path, held) is None


def test_a_process_that_takes_the_file_away_has_agreed(tmp_path: Path):
    with played_api(str(tmp_path / RELOAD_FILE)) as api:
        assert ask(tmp_path, api, settings(), MODEL)


def test_a_process_that_does_not_answer_or_has_ended_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reload, "ANSWER_S", 0.1)
    with played_api() as api:
        assert not ask(tmp_path, api, settings(), MODEL)
        assert not (tmp_path / RELOAD_FILE).exists()
    assert not ask(tmp_path, api, settings(), MODEL)
    assert not (tmp_path / RELOAD_FILE).exists()


@pytest.mark.parametrize("text", ["", "{", '{"settings": 1}', '{"settings": {"ring_size": 0}, "model_path": ""}'])
def test_what_makes_no_sense_is_not_taken(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture):
    (tmp_path / RELOAD_FILE).write_text(text)
    assert read_asked(tmp_path, settings()) is None
    assert RELOAD_FILE in caplog.text


def test_the_file_holds_settings_of_the_ring_alone(tmp_path: Path):
    class Process:
        def send_signal(self, _: int) -> None:
            written = json.loads((tmp_path / RELOAD_FILE).read_text())
            assert "ring_size" in written["settings"] and "api_keys" not in written["settings"]
            confirm(tmp_path)

    process: Any = Process()
    assert ask(tmp_path, process, settings(api_keys="a:secret"), MODEL)
