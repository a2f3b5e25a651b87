"""Rings that lose a rank, or in which one hangs: who notices, how soon, and what the api is told."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from server.protocol import DumpStacks, Failed, FromEngine, Shutdown
from tests.faulty_ranks import MESSAGE, FaultyRank
from tests.ring_harness import RingUnderTest, running_ring

pytestmark = pytest.mark.ring

PROMPT = [5, 6, 7, 8]


def last_words(messages: list[FromEngine]) -> str:
    """Why the ring ended, as the api was told."""
    (reason,) = [message.message for message in messages if isinstance(message, Failed)]
    return reason


def records_of(ring: RingUnderTest, words: str) -> dict[int, str]:
    """The log records that hold `words`, by rank."""
    records = (json.loads(line) for line in ring.log.read_text().splitlines() if line.startswith('{"time"'))
    return {record["rank"]: record["message"] for record in records if words in record["message"]}


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_takes_the_ring_with_it_and_is_named(tiny_chat_model: Path, victim: int):
    with running_ring(tiny_chat_model, 3) as ring:
        ready = ring.wait_ready()
        ring.submit("busy", PROMPT, 1900)
        ranks = {process.pid: process for process in ring.processes()}
        os.kill(ready.ranks[victim].pid, signal.SIGKILL)
        messages = ring.wait_end()
        if victim != 0:
            assert f"rank {victim} is lost" in last_words(messages)
        for info in ready.ranks:
            ranks[info.pid].wait(timeout=10)


@pytest.mark.parametrize(("victim", "is_busy"), [(0, False), (1, True), (2, False)])
def test_a_stopped_rank_is_missed_by_both_neighbours_within_six_seconds(
    tiny_chat_model: Path, victim: int, is_busy: bool
):
    with running_ring(tiny_chat_model, 3) as ring:
        ready = ring.wait_ready()
        ranks = {process.pid: process for process in ring.processes()}
        if is_busy:
            ring.submit("busy", PROMPT, 1900)
            ring.wait_stats(lambda stats: stats.num_frames_in_flight > 0)
        os.kill(ready.ranks[victim].pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        for info in ready.ranks:
            if info.rank != victim:
                ranks[info.pid].wait(timeout=15)
        noticed_s = time.monotonic() - stopped_at
        ring.wait_log(f"rank {victim} has been silent for 5 s")
        assert 3.5 < noticed_s < 9, "5 s after its last heartbeat, which a busy machine delays"
        if victim != 0:
            assert f"rank {victim} has been silent for 5 s" in last_words(ring.wait_end())
        os.kill(ready.ranks[victim].pid, signal.SIGKILL)  # mlx.launch waits for it


@pytest.mark.parametrize("victim", [0, 1])
def test_the_stacks_of_a_wedged_ring_are_in_the_log_and_it_ends_in_order(
    tiny_chat_model: Path, tmp_path: Path, victim: int
):
    """Rank 0's engine may be stuck like any other rank: what the api says is heard all the same."""
    fault = FaultyRank("wedge", victim, tmp_path / "trigger")
    with running_ring(tiny_chat_model, 3, env=fault.environment) as ring:
        ring.wait_ready()
        fault.fail_in_the_next_step()
        ring.submit("wedged", PROMPT, 3)
        ring.wait_log(MESSAGE)
        ring.wait_stats(lambda stats: stats.num_frames_in_flight > 0)
        for reason in ("nothing moves", "once more"):
            ring.send(DumpStacks(reason))
            ring.wait_log_of_ranks(f"because {reason}", 3)
        stacks = records_of(ring, "because nothing moves")
        assert {rank for rank, text in stacks.items() if "wedge" in text} == {victim}
        assert all("receiver:" in text and "MainThread:" in text for text in stacks.values())
        ring.send(Shutdown())
        assert ring.launcher.wait(timeout=20) == 0


def test_a_rank_that_lets_no_thread_run_is_missed_and_says_where_it_was(tiny_chat_model: Path, tmp_path: Path):
    fault = FaultyRank("hold_the_lock", 1, tmp_path / "trigger")
    with running_ring(tiny_chat_model, 3, env=fault.environment) as ring:
        ring.wait_ready()
        fault.fail_in_the_next_step()
        ring.submit("stuck", PROMPT, 3)
        assert "rank 1 has been silent for 5 s" in last_words(ring.wait_end())
        ring.wait_log("in hold_the_lock")


def test_a_rank_without_memory_says_what_it_held_and_what_to_change(tiny_chat_model: Path, tmp_path: Path):
    fault = FaultyRank("take_memory", 2, tmp_path / "trigger")
    with running_ring(tiny_chat_model, 3, env=fault.environment) as ring:
        ring.wait_ready()
        fault.fail_in_the_next_step()
        ring.submit("large", PROMPT, 3)
        messages = ring.wait_end()
    reason = last_words(messages)
    assert all(message.out_of_memory for message in messages if isinstance(message, Failed))
    assert reason.startswith("rank 2 (") and "out of memory" in reason and "MiB" in reason
    assert all(key in reason for key in ("KV_CACHE_RESERVED_MEMORY_MB", "PREFILL_CHUNK_TOKENS", "LAYER_SPLIT"))
