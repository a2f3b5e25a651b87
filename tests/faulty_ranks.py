"""Faults inside a rank of a real ring, for tests of what happens then: in the first step after a test asks for one.

`faults_in_ranks/sitecustomize.py` does it inside the rank, and prints `MESSAGE`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

TESTS = Path(__file__).resolve().parent
MESSAGE = "the fault happens"


class FaultyRank:
    """`trigger` is a file that does not exist yet."""

    def __init__(self, fault: Literal["wedge", "hold_the_lock", "take_memory"], rank: int, trigger: Path) -> None:
        self._trigger = trigger
        told = json.dumps({"kind": fault, "rank": rank, "trigger": str(trigger)})
        self.environment = {
            "MLX_RING_TEST_FAULT": told,
            "PYTHONPATH": f"{TESTS / 'faults_in_ranks'}:{TESTS.parent}",
        }

    def fail_in_the_next_step(self) -> None:
        """Once: the ring that follows has no fault."""
        self._trigger.touch()
