"""A client whose machine is cut off while it waits: nothing says so, and its place on the ring is still freed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from api import connections
from server.protocol import Cancel, Submit
from tests.api.served_app import BODY, run, served
from tests.multihost.namespaces import make_hosts, why_not

pytestmark = pytest.mark.ring

# Asks and waits for the answer; it would notice an end of the connection.
CLIENT = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1])
connection.request("POST", "/v1/chat/completions", sys.argv[2])
connection.getresponse().read()
"""


def test_a_client_whose_cable_is_pulled_frees_its_place(
    tmp_path: Path, tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch
):
    if reason := why_not():
        pytest.skip(f"no other host can be made here: it {reason}")
    for name, value in {"PROBE_AFTER_S": 1, "PROBE_EVERY_S": 1, "NUM_PROBES": 1}.items():
        monkeypatch.setattr(connections, name, value)
    (tmp_path / "hosts").mkdir()

    async def test() -> None:
        with make_hosts(tmp_path / "hosts", 1) as hosts:
            (host,) = hosts.others
            async with served(tmp_path, tiny_chat_model, host=hosts.own_address) as app:
                with host.running(sys.executable, "-c", CLIENT, app.url.removeprefix("http://"), json.dumps(BODY)):
                    submit = await app.engine.read(timeout_s=20)
                    assert isinstance(submit, Submit)
                    host.cut()
                    assert await app.engine.read(timeout_s=20) == Cancel(submit.request_id)

    run(test())
