"""What follows from the end of a ring: the next one at once, later, or none. Plain bookkeeping, without a clock.

A ring that did something for somebody is followed at once, however often that happens: machines fail. Rings that come
to nothing follow each other more and more slowly, and where they do not even get ready, or run out of memory each time,
it is given up: something is wrong that another start does not mend. Asked by the supervisor alone.
"""

from __future__ import annotations

MAX_FAILED_STARTS = 3  # in a row, of a server that was never ready: its settings are wrong, not its luck
MAX_FAILED_RESTARTS = 10  # in a row, of one that was
MAX_OUT_OF_MEMORY = 6  # rings in a row; a single request that takes it all is found after four (api.suspects)
LONGEST_BACKOFF_S = 30.0
STABLE_S = 60.0  # a ring that served so long was a good one, whatever it ended of


class RingLost(Exception):
    """A ring is over.

    Args:
        permanent: another one would end the same way.
        is_explained: no request can have been the cause.
        out_of_memory: a rank could not get the memory it needed.
        is_wedged: its ranks hang; none of them will end by itself.
    """

    def __init__(
        self,
        reason: str,
        *,
        permanent: bool = False,
        is_explained: bool = False,
        out_of_memory: bool = False,
        is_wedged: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent
        self.is_explained = is_explained
        self.out_of_memory = out_of_memory
        self.is_wedged = is_wedged
        self.served_s: float | None = None  # None: it was never ready
        self.num_tokens = 0  # that it drew

    @property
    def has_served(self) -> bool:
        return self.served_s is not None


class RestartPolicy:
    def __init__(self) -> None:
        self._has_served = False
        self._failed_starts = 0
        self._in_vain = 0  # rings in a row that came to nothing, those that never got ready included
        self._out_of_memory = 0

    def seconds_to_next_start(self, lost: RingLost) -> float | None:
        """How long to wait after this end. None: give up."""
        self._has_served = self._has_served or lost.has_served
        self._failed_starts = 0 if lost.has_served else self._failed_starts + 1
        was_good = lost.num_tokens > 0 or (lost.served_s or 0.0) > STABLE_S
        self._in_vain = 0 if was_good else self._in_vain + 1
        if lost.out_of_memory:
            self._out_of_memory += 1
        elif (lost.served_s or 0.0) > STABLE_S:
            self._out_of_memory = 0
        most = MAX_FAILED_RESTARTS if self._has_served else MAX_FAILED_STARTS
        if lost.permanent or self._failed_starts >= most or self._out_of_memory >= MAX_OUT_OF_MEMORY:
            return None
        return 0.0 if self._in_vain <= 1 else min(2.0 ** (self._in_vain - 2), LONGEST_BACKOFF_S)

    def begin_anew(self) -> None:
        """What was says nothing of the rings to come: a machine was away, a request did it, or settings are others.

        All of that happens to a server that has been ready.
        """
        self._has_served = True
        self._failed_starts = self._in_vain = self._out_of_memory = 0
