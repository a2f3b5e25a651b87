"""Start-up in laps round the ring: in each one every rank does its part and tells all others how it went.

So all ranks go on together or none does, and a failure names its rank. It knows nothing of what is done in a lap;
`startup` runs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from config import ConfigError
from distributed.errors import DistributedError, ModelUnavailable
from distributed.handshake import Introduction
from distributed.memory import is_allocation_failure
from distributed.pipeline import Pipeline
from server.errors import ServerError
from server.status import RankStatus

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Outcome(msgspec.Struct, frozen=True):
    """One rank's part in a lap: what it made, as JSON, or why it could not. `permanent`: trying again cannot help."""

    value: Any = None
    error: str | None = None
    permanent: bool = False
    out_of_memory: bool = False


class StartError(ServerError):
    """A rank could not start; all ranks know."""

    def __init__(self, message: str, permanent: bool, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.out_of_memory = out_of_memory


class Laps:
    """This rank's end of them. `status` says in /health what the rank is doing."""

    def __init__(self, pipeline: Pipeline, everyone: list[Introduction], status: RankStatus) -> None:
        self._pipeline = pipeline
        self._everyone = everyone
        self._status = status

    def run(self, doing: str, work: Callable[[], T], kind: type[T]) -> list[T]:
        """Do `work` on every rank; every rank's result, in rank order.

        Raises:
            StartError: on every rank, if the work of any of them failed.
        """
        self.tell(doing)
        try:
            outcome = Outcome(msgspec.to_builtins(work()))
        except (DistributedError, ServerError, ConfigError) as error:
            outcome = Outcome(error=str(error), permanent=not isinstance(error, ModelUnavailable))
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            logger.exception("could not %s", doing)
            out_of_memory = is_allocation_failure(error)
            reason = self._status.out_of_memory(error) if out_of_memory else f"{type(error).__name__}: {error}"
            outcome = Outcome(error=f"could not {doing}: {reason}", out_of_memory=out_of_memory)
        outcomes = [
            msgspec.json.decode(record, type=Outcome) for record in self._pipeline.lap(msgspec.json.encode(outcome))
        ]
        for rank, other in enumerate(outcomes):
            if other.error is not None:
                raise StartError(f"{self.name(rank)}: {other.error}", other.permanent, other.out_of_memory)
        return [msgspec.convert(other.value, kind) for other in outcomes]

    def name(self, rank: int) -> str:
        """For messages: the rank and its machine."""
        return f"rank {rank} ({self._everyone[rank].host})"

    def tell(self, doing: str) -> None:
        """Say in the log and in /health what this rank is doing."""
        self._status.state = doing
        logger.info("%s", doing)
