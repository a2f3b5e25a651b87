"""The store of responses: whose they are, how many it keeps, and what happens when its file cannot be used."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import stat
from pathlib import Path

import pytest

from api.errors import StoreFailure
from api.responses import store as response_store
from api.responses.store import ResponseStore, StoredItem, StoredResponse
from tests.api.served_app import run

LARGE = 10 * 1024 * 1024


def response(number: int, *earlier: StoredItem, size: int = 0) -> StoredResponse:
    """One that has an item before and an item after it."""
    asked = StoredItem(f"in_{number}", f'"asked {number}{"." * size}"')
    said = StoredItem(f"out_{number}", f'"said {number}"')
    return StoredResponse(f"resp_{number}", f'{{"number":{number}}}', [*earlier, asked], [said])


def store_in(folder: Path, max_responses: int = 100, max_bytes: int = LARGE) -> ResponseStore:
    return ResponseStore(folder / ".run", max_responses, max_bytes)


async def ids(store: ResponseStore, response_id: str, *, with_output: bool = True) -> list[str]:
    items = await store.items("alice", response_id, with_output=with_output)
    assert items is not None
    return [item.id for item in items]


def num_items(store: ResponseStore) -> int:
    with contextlib.closing(sqlite3.connect(store.path)) as database:
        return database.execute("SELECT count(*) FROM items").fetchone()[0]


def test_a_response_is_there_as_soon_as_it_was_saved_and_after_a_restart(tmp_path: Path):
    async def test() -> None:
        store = store_in(tmp_path)
        store.save("alice", response(1))
        for reader in (store, store_in(tmp_path)):
            assert await reader.body("alice", "resp_1") == '{"number":1}'
            assert await ids(reader, "resp_1") == ["in_1", "out_1"]
            assert await ids(reader, "resp_1", with_output=False) == ["in_1"]
            item = await reader.item("alice", "out_1")
            assert item is not None and item.body == '"said 1"'

    run(test())


def test_nobody_else_reads_the_file(tmp_path: Path):
    async def test() -> None:
        store = store_in(tmp_path)
        store.save("alice", response(1))
        await store.body("alice", "resp_1")
        assert stat.S_IMODE(store.path.stat().st_mode) == 0o600

    run(test())


@pytest.mark.parametrize("other", ["bob", None])
def test_a_response_is_there_for_its_owner_alone(tmp_path: Path, other: str | None):
    async def test() -> None:
        store = store_in(tmp_path)
        store.save("alice", response(1))
        assert await store.body(other, "resp_1") is None
        assert await store.items(other, "resp_1", with_output=True) is None
        assert await store.item(other, "out_1") is None
        assert not await store.delete(other, "resp_1")
        assert await store.delete("alice", "resp_1")
        assert not await store.delete("alice", "resp_1")
        assert await store.body("alice", "resp_1") is None
        assert num_items(store) == 0

    run(test())


def test_a_conversation_s_items_are_stored_once_and_outlive_its_first_response(tmp_path: Path):
    async def test() -> None:
        store = store_in(tmp_path, max_responses=2)
        store.save("alice", response(1))
        for number in (2, 3, 4):
            earlier = await store.items("alice", f"resp_{number - 1}", with_output=True)
            assert earlier is not None
            store.save("alice", response(number, *earlier))
        assert await store.body("alice", "resp_2") is None  # the oldest are gone
        expected = [f"{name}_{number}" for number in (1, 2, 3, 4) for name in ("in", "out")]
        assert await ids(store, "resp_4") == expected
        assert num_items(store) == 8
        assert await store.delete("alice", "resp_3")
        assert await ids(store, "resp_4") == expected
        assert await store.delete("alice", "resp_4")
        assert num_items(store) == 0

    run(test())


def test_a_conversation_whose_response_is_deleted_while_it_goes_on_keeps_its_items(tmp_path: Path):
    async def test() -> None:
        store = store_in(tmp_path)
        store.save("alice", response(1))
        earlier = await store.items("alice", "resp_1", with_output=True)
        assert earlier is not None
        await store.delete("alice", "resp_1")
        store.save("alice", response(2, *earlier))
        assert await ids(store, "resp_2") == ["in_1", "out_1", "in_2", "out_2"]

    run(test())


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path):
    async def test() -> None:
        store = store_in(tmp_path, max_responses=3)
        for number in range(5):
            store.save("alice", response(number))
        left = [number for number in range(5) if await store.body("alice", f"resp_{number}")]
        assert left == [2, 3, 4]
        assert num_items(store) == 6

    run(test())


def test_the_oldest_go_when_they_take_too_much_room(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        store = store_in(tmp_path, max_bytes=200_000)
        for number in range(10):
            store.save("alice", response(number, size=50_000))
        left = [number for number in range(10) if await store.body("alice", f"resp_{number}")]
        assert left in ([7, 8, 9], [8, 9])
        assert not caplog.records
        store.save("alice", response(10, size=200_000))  # would push out all others, and itself
        assert await store.body("alice", "resp_10") is None
        assert await store.body("alice", "resp_9") is not None
        assert "RESPONSES_STORE_MAX_BYTES" in caplog.text

    run(test())


def test_a_damaged_file_is_said_in_the_log_and_nothing_breaks(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        store = store_in(tmp_path)
        store.path.parent.mkdir()
        store.path.write_bytes(b"no database " * 1000)
        store.save("alice", response(1))
        with pytest.raises(StoreFailure):
            await store.body("alice", "resp_1")
        assert "resp_1 is not stored" in caplog.text
        assert f"{store.path} cannot be used" in caplog.text
        store.path.unlink()  # as the log says
        store.save("alice", response(2))
        assert await store.body("alice", "resp_2") is not None

    run(test())


def test_a_folder_that_cannot_be_made_is_said_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        (tmp_path / ".run").write_text("a file")
        store = store_in(tmp_path)
        store.save("alice", response(1))
        with pytest.raises(StoreFailure):
            await store.body("alice", "resp_1")
        assert "resp_1 is not stored" in caplog.text

    run(test())


def test_while_somebody_else_has_the_file_locked_nobody_waits_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(response_store, "BUSY_TIMEOUT_S", 0.2)

    async def test() -> None:
        store = store_in(tmp_path)
        store.save("alice", response(1))
        assert await store.body("alice", "resp_1") is not None
        with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            async with asyncio.timeout(10):  # 100 times the wait for the lock would be 20 s
                for number in range(2, 102):
                    store.save("alice", response(number))
                with pytest.raises(StoreFailure):
                    await store.body("alice", "resp_1")
            other.execute("ROLLBACK")
        assert "resp_101 is not stored" in caplog.text
        assert await store.body("alice", "resp_1") is not None

    run(test())


def test_no_more_responses_wait_for_the_disk_than_the_memory_should_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(response_store, "MAX_PENDING", 1)

    async def test() -> None:
        store = store_in(tmp_path)
        store.path.parent.mkdir()
        with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            store.save("alice", response(1))
            store.save("alice", response(2))
            other.execute("ROLLBACK")
        assert "resp_2 is not stored" in caplog.text
        assert await store.body("alice", "resp_1") is not None
        assert await store.body("alice", "resp_2") is None
        store.save("alice", response(3))
        assert await store.body("alice", "resp_3") is not None

    run(test())
