"""The logs: what a line holds, how a rank's line reaches server.log, and what happens when that cannot be written."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import logging as our_logging
from config.logging import relay_rank_line, setup_api_logging, setup_rank_logging
from tests.config.conftest import Load


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


def rank_line(message: str = "loaded", level: int = logging.INFO, *, failed: bool = False) -> str:
    """What a rank's process writes for one record."""
    stream = io.StringIO()
    setup_rank_logging("DEBUG", 1, 2, "tiny", stream=stream)
    try:
        raise ValueError("no such layer") if failed else KeyError
    except (ValueError, KeyError) as error:
        logging.getLogger("server.stage").log(level, message, exc_info=error if failed else None)
    return stream.getvalue()


def test_a_rank_writes_one_json_object_a_line_with_its_rank() -> None:
    line = rank_line("two\nlines é", failed=True)
    assert line.count("\n") == 1 and line.isascii()
    record = json.loads(line)
    exc = record.pop("exc")
    assert "ValueError: no such layer" in exc and exc.startswith("Traceback")
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "level": "INFO",
        "logger": "server.stage",
        "message": "two\nlines é",
        "rank": 1,
        "world_size": 2,
        "model": "tiny",
    }


def test_a_ranks_record_reaches_server_log_as_text(load: Load, tmp_path: Path) -> None:
    line = rank_line("loaded 100% of it", failed=True)
    setup_api_logging(load(), tmp_path / "server.log")
    relay_rank_line(line.replace("\n", "\r\n"))
    text = (tmp_path / "server.log").read_text()
    assert "INFO    server.stage [rank 1/2]: loaded 100% of it\nTraceback" in text
    assert text.endswith("ValueError: no such layer\n")


def test_a_ranks_record_reaches_server_log_as_the_same_json(load: Load, tmp_path: Path) -> None:
    line = rank_line(failed=True)
    setup_api_logging(load("LOG_FORMAT=json"), tmp_path / "server.log")
    relay_rank_line(line)
    assert (tmp_path / "server.log").read_text() == line


def test_the_apis_own_records_carry_the_model_and_no_rank(load: Load, tmp_path: Path) -> None:
    setup_api_logging(load("LOG_FORMAT=json\nMODEL_NAME=mine\nRING_SIZE=3"), tmp_path / "server.log")
    logging.getLogger("api").info("ready")
    record = json.loads((tmp_path / "server.log").read_text())
    assert (record["rank"], record["world_size"], record["model"]) == (None, 3, "mine")


def test_anything_else_a_rank_prints_is_a_warning_of_the_ring(load: Load, tmp_path: Path) -> None:
    setup_api_logging(load("LOG_FORMAT=json"), tmp_path / "server.log")
    for line in ("[ring] Couldn't bind\r\n", '{"not": "ours"}', '{"time": "x"}\n', " 10%|#\r 99%|##\r\n", "", "\r\n"):
        relay_rank_line(line)
    records = [json.loads(line) for line in (tmp_path / "server.log").read_text().splitlines()]
    assert {(record["level"], record["logger"]) for record in records} == {("WARNING", "ring")}
    assert [record["message"] for record in records] == [
        "[ring] Couldn't bind",
        '{"not": "ours"}',
        '{"time": "x"}',
        "99%|##",
    ]


def test_a_record_behind_a_progress_bar_is_still_a_record(load: Load, tmp_path: Path) -> None:
    line = rank_line()
    setup_api_logging(load(), tmp_path / "server.log")
    relay_rank_line(f" 10%|#\r 50%|##{line}")
    first, second = (tmp_path / "server.log").read_text().splitlines()
    assert first.endswith("ring: 50%|##") and second.endswith("server.stage [rank 1/2]: loaded")


def test_the_level_holds_for_the_api_and_for_relayed_records(load: Load, tmp_path: Path) -> None:
    debug, error = rank_line("quiet", logging.DEBUG), rank_line("loud", logging.ERROR)
    setup_api_logging(load("LOG_LEVEL=WARNING"), tmp_path / "server.log")
    relay_rank_line(debug)
    relay_rank_line(error)
    logging.getLogger("api").info("quiet")
    assert "quiet" not in (text := (tmp_path / "server.log").read_text()) and "loud" in text


def test_server_log_is_rotated_and_old_ones_are_bounded(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(our_logging, "MAX_LOG_BYTES", 1000)
    monkeypatch.setattr(our_logging, "NUM_OLD_LOGS", 2)
    setup_api_logging(load(), tmp_path / "server.log")
    for number in range(100):
        logging.getLogger("api").info("line %d", number)
    logs = sorted(path.name for path in tmp_path.glob("server.log*"))
    assert logs == ["server.log", "server.log.1", "server.log.2"]
    assert all((tmp_path / name).stat().st_size <= 1000 for name in logs)
    assert "line 99" in (tmp_path / "server.log").read_text()


def test_a_log_that_is_removed_or_renamed_is_made_again(load: Load, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    setup_api_logging(load(), log)
    for number, take_away in enumerate((log.unlink, lambda: log.rename(tmp_path / "old.log"))):
        logging.getLogger("api").info("before")
        take_away()
        logging.getLogger("api").info("line %d", number)
        assert log.read_text().endswith(f"api: line {number}\n") and "before" not in log.read_text()
    assert "before" in (tmp_path / "old.log").read_text()


def test_a_log_that_cannot_be_opened_goes_to_stderr_after_one_warning(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_api_logging(load(), tmp_path / "no such folder" / "server.log")
    logging.getLogger("api").info("first")
    logging.getLogger("api").info("second")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("warning: ") and "cannot be written (No such file or directory)" in lines[0]
    assert lines[1].endswith("api: first") and lines[2].endswith("api: second")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_sends_the_log_to_stderr(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    setup_api_logging(load(), Path("/dev/full"))
    logging.getLogger("api").info("first")
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1 and "No space left" in err and err.endswith("api: first\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_nothing_is_lost_but_the_log_where_stderr_is_on_the_full_disk_too(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_api_logging(load(), Path("/dev/full"))
    stderr = open("/dev/full", "w")  # closing it fails like all writing
    monkeypatch.setattr("sys.stderr", stderr)
    logging.getLogger("api").info("first")
    relay_rank_line(rank_line())
    with contextlib.suppress(OSError):
        stderr.close()


def test_the_file_is_tried_again_with_each_record(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "folder" / "server.log"
    setup_api_logging(load(), log)
    logging.getLogger("api").info("to stderr")
    log.parent.mkdir()
    logging.getLogger("api").info("to the file")
    assert log.read_text().endswith("api: to the file\n")
    assert capsys.readouterr().err.endswith("api: to stderr\n")
    log.unlink()
    log.parent.rmdir()
    logging.getLogger("api").info("to a file that is gone")


def test_stderr_gets_the_log_too_when_asked(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_api_logging(load(), tmp_path / "server.log", to_stderr=True)
    logging.getLogger("api").info("both")
    assert capsys.readouterr().err == (tmp_path / "server.log").read_text() != ""


def test_libraries_that_log_every_step_are_quiet_unless_debugging(load: Load, tmp_path: Path) -> None:
    setup_api_logging(load(), tmp_path / "server.log")
    logging.getLogger("httpx").info("GET /")
    assert not (tmp_path / "server.log").exists()
    setup_api_logging(load("LOG_LEVEL=DEBUG"), tmp_path / "server.log")
    logging.getLogger("httpx").info("GET /")
    assert "GET /" in (tmp_path / "server.log").read_text()
