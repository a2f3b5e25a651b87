"""What rank 0's own Python costs a frame: scheduling, headers, messages to the api; and other ranks' share of it.

The real scheduler, frames and protocol without a model: streams decode in two groups, and what the last rank would
draw is made up. Graph building and evaluation are the model's cost, sockets the kernel's; neither is in here.

    python -m bench.engine_time
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

from bench.environment import heading, table
from server.frame import ResultHeader, StepHeader, decode_header, encode_header
from server.kv_budget import CacheCost, KVBudget, RankCost
from server.protocol import SamplingParams, StepOutput, Submit, encode
from server.scheduler import Scheduler, SchedulerOptions, Step

T = TypeVar("T")

_STEP_S = 0.01  # what a stage is said to take: by the row, so that several groups are worth it
_LAYERS = 32


class Parts:
    """Seconds of each part of a frame's way, frame by frame."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def timed(self, part: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        self.seconds[part].append(time.perf_counter() - started)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--quick", action="store_true", help="a second, to see that it works")
    arguments = parser.parse_args()
    print(heading("The engine's own time"))
    print("Microseconds a decode frame, means; a frame carries one group's streams\n")
    rows = []
    for ranks in arguments.ranks:
        for streams in arguments.streams:
            parts = run(ranks, streams, 200 if arguments.quick else arguments.frames)
            num_frames = len(parts.seconds["complete"])
            micros = {part: sum(seconds) / num_frames * 1e6 for part, seconds in parts.seconds.items()}
            of_rank_0 = sum(micros.values()) - micros["another rank: header in and out"]
            rows.append([str(ranks), str(streams), *(f"{value:.0f}" for value in micros.values()), f"{of_rank_0:.0f}"])
    print(table(["P", "streams", *micros, "rank 0, all"], rows))


def run(num_ranks: int, num_streams: int, num_frames: int) -> Parts:
    """Decode frames only: prompts are read before anything is timed."""
    budget = KVBudget([RankCost([CacheCost(1)] * _LAYERS, True, True, True)] * num_ranks, 1 << 40, max_tokens=1 << 22)
    options = SchedulerOptions(max_sequence_length=1 << 17, max_running=num_streams, num_stages=num_ranks)
    scheduler = Scheduler(budget, options)
    for stream in range(num_streams):
        prompt = [stream + 1, *range(1000, 1040)]
        scheduler.add(Submit(f"stream {stream}", prompt, SamplingParams(), 1 << 16, False, [2]))
    parts, in_flight, warm_up = Parts(), [], num_frames // 4
    for number in range(num_frames + warm_up):
        if number == warm_up:
            parts.seconds.clear()
        while (step := parts.timed("schedule", scheduler.schedule)) is not None:
            in_flight.append(step)
        step = in_flight.pop(0)
        if not step.frame.rows or step.frame.group_id is None:
            _complete(scheduler, step, num_ranks)
            continue
        header = parts.timed("encode the frame", lambda step=step: encode_header(StepHeader(step.frame)))
        parts.timed("another rank: header in and out", lambda header=header: encode_header(decode_header(header)))
        result = encode_header(ResultHeader(step.frame.frame_id, _times(step, num_ranks)))
        parts.timed("decode the result", lambda result=result: decode_header(result))
        outputs = parts.timed("complete", lambda step=step: _complete(scheduler, step, num_ranks))
        parts.timed("tell the api", lambda outputs=outputs: encode(StepOutput(outputs)))
    return parts


def _complete(scheduler: Scheduler, step: Step, num_ranks: int) -> list[Any]:
    times = _times(step, num_ranks)
    drawn = [[7] * len(step.frame.rows)] if step.frame.group_id is not None else []
    return scheduler.complete(ResultHeader(step.frame.frame_id, times), drawn, sum(times))


def _times(step: Step, num_ranks: int) -> list[float]:
    return [_STEP_S * max(1, len(step.frame.rows))] * num_ranks


if __name__ == "__main__":
    main()
