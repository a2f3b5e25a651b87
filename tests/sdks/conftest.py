"""One ring of 2 for all SDKs, and the SDKs that are not in the test environment itself."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartServer
from tests.running_server import RunningServer

LOCK = Path(__file__).parent / "requirements.lock"
FOLDER = Path(sys.prefix) / "sdks"

Import = Callable[[str], Any]


@pytest.fixture(scope="session")
def server(running_server: StartServer) -> RunningServer:
    return running_server(RING_SIZE=2)


@pytest.fixture(scope="session")
def import_sdk() -> Iterator[Import]:
    """Imports a package of requirements.lock by its name; skips where these cannot be fetched.

    They lie in a folder of their own at the end of the path, so what both environments have is ours, and the servers
    that tests start see none of it.
    """
    installed = FOLDER / LOCK.name  # a copy, written last
    if not installed.is_file() or installed.read_bytes() != LOCK.read_bytes():
        shutil.rmtree(FOLDER, ignore_errors=True)
        options = "--quiet --disable-pip-version-check --no-input --retries 1 --no-deps --no-compile".split()
        fetch = [sys.executable, "-m", "pip", "install", *options, "--target", str(FOLDER), "-r", str(LOCK)]
        done = subprocess.run(fetch, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"pip cannot fetch the SDKs: {done.stderr[-300:]}")
        shutil.copy(LOCK, installed)
    sys.path.append(str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
