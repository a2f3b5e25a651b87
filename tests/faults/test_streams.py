"""What the rounds of `tests.faults` go by: that a stream which is not the same is seen, and how long it paused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.runtime_files import write_json
from tests.faults.ring_file import RingFile
from tests.faults.streams import Stream


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"id": "one", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def call(arguments: str, **head: Any) -> dict[str, Any]:
    return {"index": 0, "function": {"arguments": arguments}, **head}


EVENTS = [
    chunk(role="assistant", content="he"),
    chunk(content="llo"),
    chunk(tool_calls=[call("{", id="call_1")]),
    chunk(tool_calls=[call("}")]),
    chunk("tool_calls"),
    {"id": "one", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}},
]


def read(events: list[dict[str, Any]]) -> Stream:
    stream = Stream("any")
    for event in events:
        stream.take(event)
    return stream


def test_the_same_answer_in_other_pieces_is_the_same():
    other = [chunk(role="assistant"), chunk(content="hel"), chunk(content="lo"), *EVENTS[2:]]
    assert read(other).said.difference(read(EVENTS).said) == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda events: events[:1] + events,  # the role and the first piece again
        lambda events: events[:1] + events[1:2] * 2 + events[2:],
        lambda events: events[:1] + events[2:],
        lambda events: [chunk(role="assistant", content="ha"), *events[1:]],
        lambda events: events[:3] + events[2:],  # the call begins again
        lambda events: events[:3] + events[4:],
        lambda events: [*events[:4], chunk("stop"), events[5]],
        lambda events: events[:4] + events[5:],
        lambda events: events[:5],
        lambda events: [*events, {"error": {"message": "the ring was lost"}}],
        lambda events: [events[0], {**events[1], "id": "another"}, *events[2:]],
    ],
)
def test_what_is_repeated_missing_or_wrong_is_a_difference(change: Callable[[list[dict[str, Any]]], Any]):
    assert read(change(EVENTS)).said.difference(read(EVENTS).said)
    assert read(EVENTS).said.difference(read(change(EVENTS)).said)


@pytest.mark.parametrize(("moment", "pause"), [(0.5, 6.0), (2.5, 5.5), (8.5, 1.5), (10.0, 0.0)])
def test_a_pause_is_the_longest_wait_after_the_moment(moment: float, pause: float):
    stream = Stream("any", arrivals=[1.0, 2.0, 8.0], ended_at=10.0)
    assert stream.pause_after(moment) == pause


def write_ring(root: Path, launcher: int, *rank_pids: int) -> None:
    ranks = [{"rank": rank, "pid": pid} for rank, pid in enumerate(rank_pids)]
    write_json(root / ".run" / "ring.json", {"launcher_pid": launcher, "ranks": ranks})


def test_the_start_up_is_that_of_the_ring_that_serves(tmp_path: Path):
    (tmp_path / ".run").mkdir()
    write_ring(tmp_path, 1, 10, 11)
    ring_file = RingFile(tmp_path)
    assert ring_file.start_up_s() is None, "it was there before anybody looked"
    for launcher, rank_pids in ((2, ()), (3, ()), (3, (30, 31))):
        write_ring(tmp_path, launcher, *rank_pids)
        ring_file.look()
        ring_file.look()
    assert [(ring.launcher_pid, ring.serves) for ring in ring_file.rings] == [
        (1, True),
        (2, False),
        (3, False),
        (3, True),
    ]
    launched, served = ring_file.rings[2:]
    assert ring_file.start_up_s() == served.written_at - launched.written_at
