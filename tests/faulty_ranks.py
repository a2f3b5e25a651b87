"""Faults at a certain place of a real ring, for tests of what happens then: the environment that puts them there.

The fault happens in the stage of one rank when it is given a certain token, so a test places it by a prompt, and
`MESSAGE` is in the log when it has. `faults_in_ranks/sitecustomize.py` does it inside the rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

TESTS = Path(__file__).resolve().parent
MESSAGE = "the fault happens"

Fault = Literal["wedge", "hold_the_lock", "take_memory"]


def fault_in_rank(fault: Fault, rank: int, token: int, *, once: Path | None = None) -> dict[str, str]:
    """`once`: a file that does not exist yet; the fault happens in the first ring that meets it, and in none after."""
    told = {"kind": fault, "rank": rank, "token": token, "once": None if once is None else str(once)}
    return {"MLX_RING_TEST_FAULT": json.dumps(told), "PYTHONPATH": f"{TESTS / 'faults_in_ranks'}:{TESTS.parent}"}
