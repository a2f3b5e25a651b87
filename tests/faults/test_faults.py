"""Processes of a ring are killed and stopped while eight streams of all kinds run: none of the streams differs.

The short form of `python -m bench.faults`, with the tiny model and one server for all rounds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.kinds import KILL, LAUNCHER, STOP, Fault, signalled
from tests.faults.rounds import run_round
from tests.faults.streams import Bodies, Stream, read_all, requests
from tests.running_server import RunningServer

pytestmark = pytest.mark.ring


@dataclass(frozen=True)
class Stage:
    server: RunningServer
    bodies: Bodies
    undisturbed: Sequence[Stream]


@pytest.fixture(scope="module")
def stage(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    keys = {"MODEL_REPO": tiny_chat_model, "RING_SIZE": 3, "PREFILL_CHUNK_TOKENS": 64, "SHUTDOWN_GRACE_S": 1}
    server = RunningServer(
        tmp_path_factory.mktemp("faults") / "a project", {key: str(value) for key, value in keys.items()}
    )
    server.start()
    try:
        bodies = requests(server.model)
        yield Stage(server, bodies, asyncio.run(read_all(server.url, bodies)))
    finally:
        server.stop()


@pytest.mark.parametrize(
    "fault",
    [*(signalled(KILL, victim) for victim in ("rank 0", "rank 1", "rank 2", LAUNCHER)), signalled(STOP, "rank 1")],
    ids=lambda fault: f"{fault.name} of {fault.victim}",
)
def test_no_stream_differs_when_a_process_of_the_ring_is_lost(stage: Stage, fault: Fault):
    """At a random piece of a random stream; the seed is in the assertion's message."""
    seed = random.randrange(2**32)
    done = asyncio.run(run_round(stage.server, stage.bodies, stage.undisturbed, fault, random.Random(seed)))
    assert done.is_sound, f"seed {seed}: {done}"
    assert done.start_up_s is not None, f"seed {seed}: the ring went on as if nothing had happened"
