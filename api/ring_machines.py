"""The ring's other machines: ends what a lost ring left on them, and knows which do not answer, and since when.

It waits for none of them and decides nothing. Used by the supervisor alone; /health shows `missed`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from config import Settings
from distributed.errors import HostAway, HostError
from distributed.hosts import ssh_targets
from distributed.remnants import end_on_workers

logger = logging.getLogger(__name__)

LOOK_S = 4.0  # for a machine to answer; one that is slower is looked for again


@dataclass(frozen=True)
class Absence:
    """A machine without which no ring can be formed."""

    host: str
    since: float  # time.time()
    reason: str


class RingMachines:
    def __init__(self, instance: str) -> None:
        self.missed: list[Absence] = []
        self._instance = instance

    async def clear(self, settings: Settings) -> dict[str, HostAway]:
        """The machines that do not answer, and why. On the others nothing of a lost ring is left then."""
        try:
            targets = ssh_targets(settings)
        except HostError:  # HOSTFILE cannot be read, which the next start will say
            return {}
        if not targets:
            return {}
        failures = await asyncio.to_thread(end_on_workers, settings, targets, self._instance, LOOK_S)
        away = {target: failure for target, failure in failures.items() if isinstance(failure, HostAway)}
        for target in failures.keys() - away.keys():
            logger.warning("%s", failures[target])
        return away

    def miss(self, away: Mapping[str, HostAway], since: float) -> None:
        """Those that are away are waited for; the first ones have been away since the ring was lost, at `since`."""
        known = {absence.host: absence.since for absence in self.missed}
        if away and known.keys() != away.keys():
            logger.warning("waiting for %s", reasons(away))
        now = time.time() if known else since
        self.missed = [Absence(host, known.get(host, now), str(reason)) for host, reason in away.items()]


def reasons(away: Mapping[str, HostAway]) -> str:
    """Each names its machine."""
    return "; ".join(map(str, away.values()))
