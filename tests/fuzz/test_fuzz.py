"""A short run of the fuzzer; `python -m tests.fuzz --bodies 10000` is the long one."""

from __future__ import annotations

import pytest

from tests.conftest import StartServer
from tests.fuzz.bodies import MAX_TOKENS
from tests.fuzz.fuzzing import TARGETS, Fuzzer

NUM_BODIES = 120


@pytest.mark.ring
def test_whatever_body_comes_the_answer_is_a_documented_one_and_the_next_request_is_served(running_server: StartServer):
    server = running_server(RING_SIZE=2, DEFAULT_MAX_TOKENS=MAX_TOKENS)
    fuzzer = Fuzzer(server.url, server.model)
    fuzzer.run(NUM_BODIES, seed=1)
    assert fuzzer.statuses.keys() == {operation.name for operation in TARGETS}
    for name, statuses in fuzzer.statuses.items():  # neither all right nor all wrong: then it would test little
        assert statuses[200] and statuses[400], f"{name}: {statuses}"
