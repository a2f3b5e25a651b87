"""The short form of `python -m bench.soak`: a server that many clients have left holds what it held before."""

from __future__ import annotations

import pytest

from bench.soak import SETTINGS, soak
from tests.conftest import StartServer

pytestmark = pytest.mark.ring

SECONDS = 10.0
MOST_RESIDENT = 1.2  # so short a time says little of it: this is for what is lost by the megabyte


def test_clients_that_leave_at_any_time_leave_nothing_behind(running_server: StartServer):
    seen = soak(running_server(**SETTINGS), SECONDS)
    assert seen.problems(MOST_RESIDENT) == []
    assert seen.load.left.total() > 0 and seen.load.answered.total() > 0
