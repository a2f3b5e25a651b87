"""The compute loop of ranks 1 to P-1: take a frame, run the stage, pass on. It ends with the process
(`distributed.fatal`).
"""

from __future__ import annotations

from typing import NoReturn

from distributed.pipeline import Arrival, Pipeline
from server.counters import StageClock
from server.errors import DisagreementError
from server.frame import StepHeader, decode_header, encode_header
from server.stage import Stage


def run_worker(stage: Stage, pipeline: Pipeline, clock: StageClock) -> NoReturn:
    """Serve frames for ever; `clock` is told where the time went.

    Raises:
        DisagreementError: a frame does not fit this rank's state; the ring has to start again.
    """
    while True:
        # In a function of its own, so that a rank that waits holds no tensor of its last frame.
        _serve(pipeline.inbox.get(), stage, pipeline, clock)


def _serve(arrival: Arrival, stage: Stage, pipeline: Pipeline, clock: StageClock) -> None:
    pipeline.acknowledge()
    header = decode_header(arrival.header)
    if not isinstance(header, StepHeader):
        raise DisagreementError(f"a worker got a {type(header).__name__}")
    clock.waited(is_bubble=not header.frame.after_idle)
    outgoing, arrays = stage.run(header, arrival.arrays)
    pipeline.send(encode_header(outgoing), arrays)
    clock.computed(header.frame)
