"""A newcomer's long prompt beside running streams: what its first token takes, and what it does to their gaps.

Used by `bench.long_prompts` for its tables and its curve.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.client import Answer, Request, Target, ask, ask_all, new_http
from bench.figures import percentile

WARM_PIECES = 8  # of each stream, before the gaps count: by then all are in their groups
MEASURED_PIECES = 16  # of each stream, before the newcomer comes
_FREE_S = 0.5  # after streams were broken off: the server takes them off its ranks
_LOOK_S = 0.01


@dataclass(frozen=True)
class Disturbance:
    """One newcomer beside streams. Gaps are the streams' between two pieces of text, in seconds."""

    newcomer: Answer
    before: list[float]
    during: list[float]  # from its request to its first token

    @property
    def gap_factor(self) -> float:
        """g: the streams' median gap during the prefill over the one before."""
        return percentile(self.during, 50) / percentile(self.before, 50)

    @property
    def mean_gap_factor(self) -> float:
        """The same of the mean gaps: where only some gaps hold a chunk, the median says little."""
        if not self.during:
            return float("nan")
        return statistics.fmean(self.during) / statistics.fmean(self.before)


def disturb(target: Target, streams: Sequence[Request], newcomer: Request) -> Disturbance:
    """Start `streams`, let them run, ask `newcomer`, and break the streams off when it has its answer."""
    return asyncio.run(_disturb(target, streams, newcomer))


async def _disturb(target: Target, streams: Sequence[Request], newcomer: Request) -> Disturbance:
    answers = [Answer() for _ in streams]
    async with new_http() as http:
        tasks = [
            asyncio.create_task(ask(http, target, request, answer))
            for request, answer in zip(streams, answers, strict=True)
        ]
        await _until_pieces(tasks, answers, WARM_PIECES)
        counted_from = max(answer.arrivals[-1] for answer in answers)
        await _until_pieces(tasks, answers, WARM_PIECES + MEASURED_PIECES)
        late = await ask(http, target, newcomer)
        assert not any(task.done() for task in tasks), "a stream ended before the newcomer's first token"
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
    await asyncio.sleep(_FREE_S)
    first_token = late.started + late.ttft
    return Disturbance(
        late,
        before=[gap for answer in answers for gap in answer.gaps_between(counted_from, late.started)],
        during=[gap for answer in answers for gap in answer.gaps_between(late.started, first_token)],
    )


async def _until_pieces(tasks: Sequence[asyncio.Task[Answer]], answers: Sequence[Answer], count: int) -> None:
    while min(len(answer.arrivals) for answer in answers) < count:
        for task in tasks:
            if task.done():
                task.result()  # its error, if it had one
                raise RuntimeError("a stream ended before the newcomer came")
        await asyncio.sleep(_LOOK_S)


def alone(target: Target, newcomer: Request) -> float:
    """Seconds to the first token of the same request on an idle server."""
    (answer,) = ask_all(target, [newcomer])
    return answer.ttft
