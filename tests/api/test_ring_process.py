import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from api.ring_process import RingProcess
from distributed.launch import RingCommand


def test_a_process_that_nothing_ends_does_not_keep_the_next_ring_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("api.ring_process.OUTPUT_GRACE_S", 0.2)
    # A child that is not marked as ours, so that it is not ended, and has the ring's output open.
    child = "import time; time.sleep(600)"
    launcher = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    command = RingCommand([sys.executable, "-c", launcher], dict(os.environ), [], tmp_path / "temporary")

    async def test() -> None:
        ring = RingProcess(command, "nobody-s-instance")
        await ring._start()
        async with asyncio.timeout(60):
            while not ring.last_lines:
                await asyncio.sleep(0.01)
            try:
                await ring.end(grace_s=0.2)
            finally:
                os.kill(int(ring.last_lines[0]), signal.SIGKILL)
            assert ring._process is not None and ring._process.stdout is not None
            await ring._process.stdout.read()  # closed, before the loop is

    asyncio.run(test())
    assert "does not end" in caplog.text
    assert not command.temporary.exists()
