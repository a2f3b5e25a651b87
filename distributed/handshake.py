"""How ranks that MLX's ring has just connected become sure of each other.

Over the ring every rank tells its versions, its process and the port of its control listener, and rank 0 a random
token; the control connections must show that token, which proves that both kinds of connection belong to one run (the
ring takes the first TCP connection unchecked). Called once by each rank, before anything heavy is imported or loaded.
"""

from __future__ import annotations

import os
import queue
import secrets
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from distributed.control import connect_neighbours, listen
from distributed.errors import HandshakeError, RingError
from distributed.pipeline import Pipeline
from distributed.ring import Ring
from distributed.version import MUST_AGREE, versions


class Introduction(msgspec.Struct, frozen=True):
    """What each rank says of itself first. `token` counts from rank 0 only."""

    host: str
    pid: int
    versions: dict[str, str]
    control_port: int
    token: str


def meet(ring: Ring, inbox: queue.SimpleQueue[Any], report: Callable[[], bytes]) -> tuple[Pipeline, list[Introduction]]:
    """Connect to both neighbours; returns the started pipeline (see there for the arguments) and what each rank said.

    Raises:
        HandshakeError: a rank runs other versions than rank 0; the message names rank, host and difference.
        RingError: a neighbour could not be reached.
    """
    listener = listen(ring.addresses[ring.rank]) if ring.size > 1 else None
    own = Introduction(
        host=socket.gethostname(),
        pid=os.getpid(),
        versions=versions(),
        control_port=listener.getsockname()[1] if listener else 0,
        token=secrets.token_hex(16),
    )
    everyone = read_introductions(ring.gather(msgspec.json.encode(own)))
    left = right = None
    if listener:
        right_address = (ring.addresses[ring.right], everyone[ring.right].control_port)
        left, right = connect_neighbours(
            listener, right_address, token=everyone[0].token, rank=ring.rank, size=ring.size
        )
    check_versions(everyone)  # not before they are believed: a difference is final
    pipeline = Pipeline(ring, left, right, inbox, report)
    pipeline.start()
    return pipeline, everyone


def read_introductions(records: list[bytes]) -> list[Introduction]:
    """Raises RingError where a record is not a rank's."""
    try:
        return [msgspec.json.decode(record, type=Introduction) for record in records]
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RingError(f"what came round the ring is not ours, so a stranger called at a ring port: {error}") from None


def check_versions(everyone: list[Introduction]) -> None:
    """Raises HandshakeError for the first rank whose versions differ from rank 0's."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in MUST_AGREE:
            ours, theirs = first.versions.get(name), other.versions.get(name)
            if ours != theirs:
                raise HandshakeError(
                    f"rank {rank} ({other.host}) runs {name} {theirs}, rank 0 ({first.host}) runs {ours}: "
                    "run ./launch.sh workers to bring every machine to the same state"
                )
