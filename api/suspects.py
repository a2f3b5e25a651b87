"""Which request may be what kills the ring, and who is tried next: plain bookkeeping over request ids.

A ring that died without a known cause may have died of a request it worked on. One that gets further on the next ring
is cleared; one that does not, twice, is tried with nothing else on the ring, and only if rings die of it twice more is
it guilty. What merely waited is never blamed. No clock, no socket, no asyncio; asked by the engine client alone.
"""

from __future__ import annotations

from collections.abc import Sequence

DEATHS_OF_A_SUSPECT = 2  # in company, or not: after so many it is tried alone
DEATHS_ALONE = 2  # in its trial; after these it is guilty
# A ring is given what the last one drew, which reaches the api before the next step begins: so a request that kills at
# some token kills the next ring at its first step. One that comes so many tokens further is not what killed the last.
# A trial is as short as that, so that two deaths by chance do not fall into the trials of one innocent.
CLEARING_TOKENS = 4


class Suspects:
    def __init__(self) -> None:
        self._deaths: dict[str, int] = {}  # in a row, without the request getting further
        self._gained: dict[str, int] = {}  # tokens that the ring which serves has given it
        self._to_try: list[str] = []  # the first one is on trial

    @property
    def on_trial(self) -> str | None:
        """The one request that may be on the ring. None: there is no trial."""
        return self._to_try[0] if self._to_try else None

    def may_run(self, request_id: str) -> bool:
        """Whether the ring may be given this request now."""
        return not self._to_try or request_id == self._to_try[0]

    def ring_died(self, worked_on: Sequence[str]) -> str | None:
        """A ring died without a known cause while it worked on these, in the order they are to be tried.

        Returns the request that is guilty, if one is. Its guilt explains what happened to all others, so they are free.
        """
        for request_id in worked_on:
            self._deaths[request_id] = self._deaths.get(request_id, 0) + 1
        if self.on_trial is None:
            self._to_try = [request_id for request_id in worked_on if self._deaths[request_id] >= DEATHS_OF_A_SUSPECT]
            return None
        tried = self._to_try[0]
        if self._deaths[tried] < DEATHS_OF_A_SUSPECT + DEATHS_ALONE:
            return None
        self._deaths.clear()
        self._to_try.clear()
        return tried

    def ring_began(self) -> None:
        """A new ring serves: what it gives counts from nothing."""
        self._gained.clear()

    def gained(self, request_id: str, num_tokens: int) -> bool:
        """The ring gave a request so many tokens. Whether that ends a trial: others may run now."""
        if request_id not in self._deaths:
            return False
        gained = self._gained[request_id] = self._gained.get(request_id, 0) + num_tokens
        return gained >= CLEARING_TOKENS and self.forget(request_id)

    def forget(self, request_id: str) -> bool:
        """A request is over, or cleared. Whether that ends its trial: others may run now."""
        self._deaths.pop(request_id, None)
        self._gained.pop(request_id, None)
        was_on_trial = request_id == self.on_trial
        if request_id in self._to_try:
            self._to_try.remove(request_id)
        return was_on_trial
