"""How much of the ring the requests of one API key may take: so many at once, and so many that wait.

Plain bookkeeping over request ids, without a clock, a socket or asyncio. Where a key has no place left its requests
wait here and not in the ring's queue, so they are in nobody else's way. Asked by the engine client alone.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field


@dataclass
class _Key:
    on_ring: set[str] = field(default_factory=set)
    waiting: list[tuple[int, int, str]] = field(default_factory=list)  # priority, order of arrival, request id


class KeyLimits:
    """Requests are counted by their `owner`, the key's label; None is a request without a key, which has no limits."""

    def __init__(self, max_concurrent: int | None, max_queued: int | None) -> None:
        """None: no such limit."""
        self.max_queued = max_queued
        self._max_concurrent = max_concurrent
        self._keys: dict[str, _Key] = {}
        self._held_back: set[str] = set()
        self._num_arrived = 0

    def has_room(self, owner: str | None, num_more: int, *, num_running: int, num_waiting: int, num_free: int) -> bool:
        """Whether the key may send so many more, while so many of its requests run and wait, here or in the ring's
        queue, and the ring has so many free places."""
        if owner is None or self.max_queued is None:
            return True
        if self._max_concurrent is not None:
            num_free = max(0, self._max_concurrent - num_running)
        return num_waiting + num_more <= self.max_queued + num_free

    def most(self, owner: str | None, most: int) -> int:
        """How many of the `most` requests that an idle server takes may be the key's."""
        if owner is None or self.max_queued is None:
            return most
        return most if self._max_concurrent is None else min(most, self.max_queued + self._max_concurrent)

    def enter(self, owner: str | None, request_id: str, priority: int = 0) -> bool:
        """Whether a new request may go to the ring now. Else it waits until `leave` names it."""
        if owner is None or self._max_concurrent is None:
            return True
        key = self._keys.setdefault(owner, _Key())
        if len(key.on_ring) < self._max_concurrent:
            key.on_ring.add(request_id)
            return True
        self._num_arrived += 1
        bisect.insort(key.waiting, (priority, self._num_arrived, request_id))
        self._held_back.add(request_id)
        return False

    def leave(self, owner: str | None, request_id: str) -> str | None:
        """A request is over, wherever it was. Returns the one that has its place now, if there is one."""
        if owner is None or (key := self._keys.get(owner)) is None:
            return None
        successor = None
        if request_id in self._held_back:
            self._held_back.remove(request_id)
            key.waiting = [entry for entry in key.waiting if entry[2] != request_id]
        else:
            key.on_ring.discard(request_id)
            if key.waiting:
                _, _, successor = key.waiting.pop(0)
                self._held_back.remove(successor)
                key.on_ring.add(successor)
        if not key.on_ring:
            del self._keys[owner]
        return successor

    def holds_back(self, request_id: str) -> bool:
        """Whether a request still waits for a place of its key."""
        return request_id in self._held_back
