"""The responses that clients may come back to, with the items of their conversations, in one SQLite file.

All work is done by one thread in the order it was asked for: an answer never waits for the disk, and who asks for a
response gets it once it was saved. A file that cannot be used costs memory of conversations, said in the log, and never
an answer. Called by the routes of /v1/responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from api.errors import StoreFailure

logger = logging.getLogger(__name__)

T = TypeVar("T")

FILE_NAME = "responses.sqlite3"
BUSY_TIMEOUT_S = 1.0  # somebody else's lock; ours are never in each other's way
TROUBLE_S = 5.0  # so long after a failure nobody waits for such a lock, or all would wait for each other
MAX_PENDING = 256  # responses that wait to be saved; a disk that hangs must not fill the memory

# An item is stored once, however many responses of a conversation have it, and goes with the last of them.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, body TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS items (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS uses (
    response INTEGER NOT NULL REFERENCES responses ON DELETE CASCADE, place INTEGER NOT NULL,
    item INTEGER NOT NULL, is_output INTEGER NOT NULL, PRIMARY KEY (response, place)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_by_id ON items (id);
CREATE INDEX IF NOT EXISTS uses_by_item ON uses (item);
CREATE TRIGGER IF NOT EXISTS unused_items AFTER DELETE ON uses BEGIN
    DELETE FROM items WHERE number = OLD.item AND NOT EXISTS (SELECT 1 FROM uses WHERE item = OLD.item);
END;
"""


@dataclass(frozen=True)
class StoredItem:
    """An item's JSON. `number` is None for one that is to be stored for the first time."""

    id: str
    body: str
    number: int | None = None


@dataclass(frozen=True)
class StoredResponse:
    """A response's JSON, the items it was made from, the earlier conversation's first, and those it gave."""

    id: str
    body: str
    input_items: Sequence[StoredItem]
    output_items: Sequence[StoredItem]

    @property
    def size_bytes(self) -> int:
        """About what it takes on the disk."""
        items = (*self.input_items, *self.output_items)
        return len(self.body.encode()) + sum(len(item.body.encode()) for item in items)


class ResponseStore:
    """`owner`, in every call, is the label of the API key that asks: nobody else's responses are there for it.

    Args: `max_responses`: 0 stores nothing; beyond the limits the oldest go.
    """

    def __init__(self, folder: Path, max_responses: int, max_bytes: int) -> None:
        self.path = folder / FILE_NAME
        self.keeps_any = max_responses > 0
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._thread = ThreadPoolExecutor(1, "response-store")
        self._places = threading.BoundedSemaphore(MAX_PENDING)
        self._failed_at = -math.inf

    # -- what routes ask for -----------------------------------------------------------------------------------------

    def save(self, owner: str | None, response: StoredResponse) -> None:
        """Returns at once."""
        if not self._places.acquire(blocking=False):
            logger.warning("%s is not stored: %d responses wait for the disk", response.id, MAX_PENDING)
            return
        self._thread.submit(self._save, owner or "", response)

    async def body(self, owner: str | None, response_id: str) -> str | None:
        """The response's JSON; None where the owner has no such response."""

        def read(database: sqlite3.Connection) -> str | None:
            row = database.execute(
                "SELECT body FROM responses WHERE id = ? AND owner = ?", (response_id, owner or "")
            ).fetchone()
            return row and row[0]

        return await self._run(read)

    async def items(self, owner: str | None, response_id: str, *, with_output: bool) -> list[StoredItem] | None:
        """What the response was made from and, `with_output`, what it gave; None where there is no such response."""

        def read(database: sqlite3.Connection) -> list[StoredItem] | None:
            number = _number(database, owner, response_id)
            if number is None:
                return None
            rows = database.execute(
                "SELECT items.id, items.body, items.number FROM uses JOIN items ON items.number = uses.item "
                "WHERE uses.response = ? AND uses.is_output <= ? ORDER BY uses.place",
                (number, with_output),
            )
            return [StoredItem(*row) for row in rows]

        return await self._run(read)

    async def item(self, owner: str | None, item_id: str) -> StoredItem | None:
        """The newest item of that id in any of the owner's responses."""

        def read(database: sqlite3.Connection) -> StoredItem | None:
            row = database.execute(
                "SELECT items.id, items.body, items.number FROM items JOIN uses ON uses.item = items.number "
                "JOIN responses ON responses.number = uses.response "
                "WHERE items.id = ? AND responses.owner = ? ORDER BY items.number DESC LIMIT 1",
                (item_id, owner or ""),
            ).fetchone()
            return StoredItem(*row) if row else None

        return await self._run(read)

    async def delete(self, owner: str | None, response_id: str) -> bool:
        """Whether there was one. Items that later responses were made from stay with those."""

        def write(database: sqlite3.Connection) -> bool:
            number = _number(database, owner, response_id)
            database.execute("DELETE FROM responses WHERE number = ?", (number,))
            return number is not None

        return await self._run(write)

    # -- in the thread -----------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `work`, after all that was asked for before. Raises StoreFailure."""

        def run() -> T:
            try:
                with self._transaction() as database:
                    return work(database)
            except (sqlite3.Error, OSError) as error:
                logger.warning("%s", self._trouble(error))
                raise StoreFailure("The store of responses cannot be used now; the server's log says why.") from error

        return await asyncio.wrap_future(self._thread.submit(run))

    def _save(self, owner: str, response: StoredResponse) -> None:
        try:
            if response.size_bytes > self._max_bytes:
                logger.warning("%s is not stored: it is larger than RESPONSES_STORE_MAX_BYTES", response.id)
                return
            with self._transaction() as database:
                _insert(database, owner, response)
                self._make_room(database)
        except (sqlite3.Error, OSError) as error:
            logger.warning("%s is not stored: %s", response.id, self._trouble(error))
        finally:
            self._places.release()

    def _make_room(self, database: sqlite3.Connection) -> None:
        """Delete the oldest responses that are over the limits."""
        while _count(database) > self._max_responses or _used_bytes(database) > self._max_bytes:
            oldest = database.execute("DELETE FROM responses WHERE number = (SELECT min(number) FROM responses)")
            if oldest.rowcount == 0:
                return

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection for one piece of work, of which all is written or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Nobody else may read what users ask; SQLite gives its other files the mode of this one.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        timeout = 0 if time.monotonic() < self._failed_at + TROUBLE_S else BUSY_TIMEOUT_S
        with contextlib.closing(sqlite3.connect(self.path, timeout=timeout, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("PRAGMA foreign_keys = ON")
            database.executescript(_SCHEMA)
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")  # an error closes the connection without it

    def _trouble(self, error: Exception) -> str:
        """Notes it; what the log says."""
        self._failed_at = time.monotonic()
        return f"{self.path} cannot be used ({error}); if the file is damaged, remove it while the server is stopped"


def _number(database: sqlite3.Connection, owner: str | None, response_id: str) -> int | None:
    row = database.execute(
        "SELECT number FROM responses WHERE id = ? AND owner = ?", (response_id, owner or "")
    ).fetchone()
    return row and row[0]


def _insert(database: sqlite3.Connection, owner: str, response: StoredResponse) -> None:
    number = database.execute(
        "INSERT INTO responses (id, owner, body) VALUES (?, ?, ?)", (response.id, owner, response.body)
    ).lastrowid
    items = [(item, False) for item in response.input_items] + [(item, True) for item in response.output_items]
    for place, (item, is_output) in enumerate(items):
        item_number = item.number
        # One that was read is still there, unless its last response has been deleted since.
        if not database.execute("SELECT 1 FROM items WHERE number = ? AND id = ?", (item_number, item.id)).fetchone():
            added = database.execute("INSERT INTO items (id, body) VALUES (?, ?)", (item.id, item.body))
            item_number = added.lastrowid
        database.execute("INSERT INTO uses VALUES (?, ?, ?, ?)", (number, place, item_number, is_output))


def _count(database: sqlite3.Connection) -> int:
    return database.execute("SELECT count(*) FROM responses").fetchone()[0]


def _used_bytes(database: sqlite3.Connection) -> int:
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size
