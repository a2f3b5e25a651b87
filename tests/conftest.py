"""Fixtures for all tests: a tiny model that chats, and real servers of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.running_server import RunningServer
from tests.tiny_chat_model import write_tiny_chat_model


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random llama with tokenizer and chat template."""
    return write_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny-chat")


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def running_server(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Call it with RING_SIZE and other keys to get a server that is ready: `running_server(RING_SIZE=2)`.

    MODEL_REPO is the tiny model unless given. The same keys give the same server to all tests of the session, so a test
    that breaks its server starts a `RunningServer` of its own. All are stopped at the end.
    """
    servers: dict[tuple[tuple[str, str], ...], RunningServer] = {}

    def start(**keys: object) -> RunningServer:
        environ = {"MODEL_REPO": str(tiny_chat_model), **{key: str(value) for key, value in keys.items()}}
        name = tuple(sorted(environ.items()))
        if name not in servers:
            server = RunningServer(tmp_path_factory.mktemp("server") / "a project", environ)
            try:
                server.start()
            except AssertionError:
                server.stop()
                raise
            servers[name] = server
        return servers[name]

    yield start
    for server in servers.values():
        server.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start rings first: they mostly wait, so those that compute fill what is left of a parallel run."""
    items.sort(key=lambda item: "ring" not in item.keywords)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows the end of its servers' logs."""
    report = yield
    if report.when == "call" and report.failed:
        for server in RunningServer.started:
            report.sections.append((f"server.log of {server.root}", server.log()[-3000:]))
    return report
