"""Runs real rings of simulated ranks and reads off their counters where the time of each stage goes.

`bench.scaling` makes its tables of what comes out; the ranks are `bench.simulated_rank`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.pipeline_model import Cost
from server.protocol import RankInfo, StageCounters, Stats, StepOutput
from tests.ring_harness import RingUnderTest, running_ring

NUM_LAYERS = 24  # of the simulated model: 1, 2, 3, 4, 6 and 8 ranks divide them evenly
HIDDEN_SIZE = 4096
ROW_BYTES = HIDDEN_SIZE * 2
_MAX_TOKENS = 8000  # more than a stream gets before it is cancelled
_PROMPT = [1, 2]


@dataclass(frozen=True)
class Usage:
    """What a ring did while it was measured.

    Shares of the time of each rank's compute thread, which add up to 1 but for the last two: `computing` is what the
    cost model says, `own` what frames took besides (Python, scheduling, evaluating). `receiving` and
    `sending` are the shares of the threads beside it.
    """

    tokens_per_s: float
    num_groups: int
    own_s_per_frame: float
    hop_s_per_frame: float  # to receive its tensors once they were announced
    computing: list[float]
    own: list[float]
    bubble: list[float]
    idle: list[float]
    receiving: list[float]
    sending: list[float]


def layer_split(ranks: int) -> list[int]:
    """Layers of each rank, as even as they go."""
    size, larger = divmod(NUM_LAYERS, ranks)
    return [size + 1] * larger + [size] * (ranks - larger)


def measure(
    model: Path, ranks: int, layer: Cost, *, streams: int, groups: int | None, settle_s: float, measured_s: float
) -> Usage:
    """Run `streams` endless answers on a ring of `ranks`, let them settle, then count for `measured_s`."""
    split = layer_split(ranks)
    program = (
        f"-m bench.simulated_rank --layer-ms {layer.fixed_s * 1000} --layer-row-ms {layer.per_row_s * 1000} "
        f"--hidden-size {HIDDEN_SIZE}"
    )
    keys: dict[str, Any] = {"layer_split": ",".join(map(str, split)), "prefix_cache": False}
    if groups is not None:
        keys["micro_batch_groups"] = groups
    with running_ring(model, ranks, program=program, **keys) as ring:
        ring.wait_ready()
        for stream in range(streams):
            ring.submit(f"stream-{stream}", _PROMPT, _MAX_TOKENS)
        running: set[str] = set()
        _watch(ring, lambda: len(running) == streams, running)
        _watch(ring, _after(settle_s), running)
        start = _next_stats(ring)
        arrivals = _watch(ring, _after(measured_s), running)
        end = _next_stats(ring)
        for stream in range(streams):
            ring.cancel(f"stream-{stream}")
    return _usage(start, end, rate(arrivals), split, layer)


def rate(arrivals: list[tuple[float, int]]) -> float:
    """Tokens per second of (when, tokens): those that came at the first moment were made before it."""
    first, last = arrivals[0][0], arrivals[-1][0]
    return sum(tokens for at, tokens in arrivals if at > first) / (last - first)


def _after(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def _watch(ring: RingUnderTest, until: Callable[[], bool], running: set[str]) -> list[tuple[float, int]]:
    """Take messages until something holds; returns when tokens came, and how many. Who gets one joins `running`."""
    arrivals = []
    while not until():
        message = ring.next()
        assert message is not None, ring.log.read_text()
        if isinstance(message, StepOutput) and message.outputs:
            ended = [output for output in message.outputs if output.finish_reason is not None]
            assert not ended, f"streams ended: {ended}"
            running |= {output.request_id for output in message.outputs}
            arrivals.append((time.perf_counter(), sum(len(output.token_ids) for output in message.outputs)))
    return arrivals


def _next_stats(ring: RingUnderTest) -> Stats:
    before = ring.stats
    _watch(ring, lambda: ring.stats is not before, set())
    assert ring.stats is not None
    return ring.stats


def _usage(start: Stats, end: Stats, tokens_per_s: float, split: list[int], layer: Cost) -> Usage:
    did = [_difference(before, after) for before, after in zip(start.ranks, end.ranks, strict=True)]
    # A rank's report is some seconds old when it arrives, so each rank's own clock says how long it counted.
    seconds = [rank.busy_s + rank.bubble_s + rank.idle_s for rank in did]
    computing_s = [
        layers * (layer.fixed_s * rank.num_frames + layer.per_row_s * rank.num_tokens)
        for layers, rank in zip(split, did, strict=True)
    ]
    own_s = [rank.busy_s - computing for rank, computing in zip(did, computing_s, strict=True)]

    def shares(parts: Iterable[float]) -> list[float]:
        return [part / whole for part, whole in zip(parts, seconds, strict=True)]

    def per_frame(parts: Iterable[float]) -> float:
        return statistics.fmean(part / max(1, rank.num_frames) for part, rank in zip(parts, did, strict=True))

    return Usage(
        tokens_per_s=tokens_per_s,
        num_groups=end.counters.num_groups,
        own_s_per_frame=per_frame(own_s),
        hop_s_per_frame=per_frame(rank.receiving_s for rank in did),
        computing=shares(computing_s),
        own=shares(own_s),
        bubble=shares(rank.bubble_s for rank in did),
        idle=shares(rank.idle_s for rank in did),
        receiving=shares(rank.receiving_s for rank in did),
        sending=shares(rank.sending_s for rank in did),
    )


def _difference(before: RankInfo, after: RankInfo) -> StageCounters:
    fields = StageCounters.__struct_fields__
    return StageCounters(**{name: getattr(after.counters, name) - getattr(before.counters, name) for name in fields})
