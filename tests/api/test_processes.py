import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from api.processes import end_processes, ring_processes

STUBBORN = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
PLAIN = "import time; print(flush=True); time.sleep(60)"


def start(code: str, instance: str) -> subprocess.Popen[bytes]:
    # Python ends its own options at -c, so the rest is there for the command line only.
    arguments = [sys.executable, "-c", code, "-m", "server", "--instance", instance]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_processes_are_found_by_their_instance_alone(ranks: list[subprocess.Popen[bytes]]):
    ranks += [start(PLAIN, "instance-a"), start(PLAIN, "instance-a"), start(PLAIN, "instance-b")]
    assert {process.pid for process in ring_processes("instance-a")} == {process.pid for process in ranks[:2]}
    assert ring_processes("instance-c") == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start another user's process")
def test_another_user_s_process_is_never_ours_whatever_it_calls_itself(ranks: list[subprocess.Popen[bytes]]):
    arguments = ["/bin/sh", "-c", "echo; read line", "-m", "server", "--instance", "instance-g"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=65534) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        ranks.append(start(PLAIN, "instance-g"))
        assert [process.pid for process in ring_processes("instance-g")] == [ranks[0].pid]
        stranger.kill()


def test_what_ends_when_asked_is_not_killed(ranks: list[subprocess.Popen[bytes]]):
    ranks.append(start(PLAIN, "instance-d"))
    assert end_processes(ring_processes("instance-d"), grace_s=10) == []
    assert ranks[0].wait(1) == -15


def test_what_does_not_end_when_asked_is_killed(ranks: list[subprocess.Popen[bytes]]):
    ranks.append(start(STUBBORN, "instance-e"))
    killed = end_processes(ring_processes("instance-e"), grace_s=0.2)
    assert [process.pid for process in killed] == [ranks[0].pid]
    assert ranks[0].wait(1) == -9


def test_a_stopped_process_ends_without_being_killed(ranks: list[subprocess.Popen[bytes]]):
    ranks.append(start(PLAIN, "instance-f"))
    process = psutil.Process(ranks[0].pid)
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    assert end_processes([process], grace_s=10) == []
