"""The end of a process that is in trouble: what it says, to whom, and that nothing keeps it from ending."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SET_UP = """
import logging, os, sys, threading
logging.basicConfig(stream=sys.stderr, format="%(message)s")
from distributed.fatal import die, die_of_hearing, end_with, introduce, start_thread, tell_at_the_end
from distributed.frames import LastWords
introduce("rank 2 (here)")
tell_at_the_end(lambda words: print("told:", words.reason, words.out_of_memory, flush=True))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", SET_UP + program]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_thread_that_fails_ends_the_process_and_says_why():
    ended = run("def work():\n    raise MemoryError('no room')\nstart_thread('worker', work)\nthreading.Event().wait()")
    assert ended.returncode == 13
    assert ended.stdout == "told: rank 2 (here): MemoryError in worker: no room True\n"
    assert "rank ends: MemoryError in worker: no room" in ended.stderr and "Traceback" in ended.stderr


def test_the_words_of_another_rank_are_passed_on_as_they_are():
    ended = run("die_of_hearing(LastWords('rank 1 (there): broken'))")
    assert ended.returncode == 13 and ended.stdout == "told: rank 1 (there): broken False\n"


def test_a_listener_that_fails_keeps_neither_the_next_nor_the_end():
    ended = run(
        "def fail(words):\n    raise OSError\n"
        "tell_at_the_end(fail)\ntell_at_the_end(lambda words: print('told too', flush=True))\ndie('broken')"
    )
    assert ended.returncode == 13 and ended.stdout.endswith("told too\n")


def test_a_log_that_nobody_reads_any_more_does_not_keep_it():
    ended = run("read, write = os.pipe()\nos.close(read)\nos.dup2(write, 2)\ndie('broken')")
    assert ended.returncode == 13 and ended.stdout == "told: rank 2 (here): broken False\n"


def test_what_blocks_for_ever_is_ended_by_the_kernel():
    ended = run("tell_at_the_end(lambda words: threading.Event().wait())\ndie('broken')")
    assert ended.returncode == -14, "SIGALRM"


def test_the_others_are_told_even_where_the_log_blocks():
    """As where mlx.launch, which reads it, is stopped: the pipe is full."""
    program = "read, write = os.pipe()\nos.set_blocking(write, False)\n"
    program += "try:\n    while True: os.write(write, b'x' * 65536)\nexcept BlockingIOError: pass\n"
    ended = run(program + "os.set_blocking(write, True)\nos.dup2(write, 2)\ndie('broken')")
    assert ended.returncode == -14 and ended.stdout == "told: rank 2 (here): broken False\n"


def test_a_process_ends_with_another_that_is_not_its_child_and_that_nobody_waits_for():
    with subprocess.Popen(["sleep", "600"]) as other:
        argv = [sys.executable, "-c", f"{SET_UP}end_with({other.pid}, 'the other')\nthreading.Event().wait()"]
        with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
            other.kill()  # and is a zombie from now on
            assert process.wait(60) == 0
            assert (
                process.stdout is not None and process.stdout.read() == "told: rank 2 (here): the other is gone False\n"
            )


def test_a_process_does_not_go_on_without_one_that_has_gone_already():
    with subprocess.Popen(["true"]) as other:
        other.wait()
    assert run(f"end_with({other.pid}, 'the other')\nthreading.Event().wait()").returncode == 0
