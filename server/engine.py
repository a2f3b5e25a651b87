"""Rank 0's loop: schedule, run the first stage, take what comes back, tell the api. One screen, top to bottom.

Requests from the api and results from the last rank arrive in one inbox; the loop waits there and nowhere else, so an
idle ring costs nothing. It holds no policy: who runs is the scheduler's business.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
from msgspec import structs

from distributed.pipeline import Arrival, Pipeline
from server.api_link import ApiLink
from server.counters import StageClock
from server.frame import ResultHeader, StepHeader, decode_header, encode_header
from server.kv_budget import MIB
from server.protocol import Cancel, RankInfo, SchedulerCounters, SequenceOutput, Stats, StepOutput, Submit
from server.scheduler import Scheduler, Step
from server.stage import Stage
from server.status import READY, decode_reports

_COUNT_EVERY_S = 0.1
MAX_LOGPROBS = 100  # likeliest tokens with each one
MAX_GRAMMAR_BYTES = 2 * MIB  # it travels in a frame's header


@dataclass(frozen=True)
class RequestLimits:
    """What any request must keep: ids out of range would corrupt memory on MLX's CPU backend."""

    vocab_size: int
    max_sequence_length: int  # prompt + completion, tokens

    def problem_of(self, submit: Submit) -> str | None:
        """Why a request cannot be served, or None."""
        token_ids = [*submit.prompt_token_ids, *submit.output_token_ids]
        if not submit.prompt_token_ids:
            return "the prompt is empty"
        if not (0 <= min(token_ids) and max(token_ids) < self.vocab_size):
            return f"a token id is outside the vocabulary of {self.vocab_size}"
        if not all(0 <= token_id < self.vocab_size for token_id in submit.sampling.logit_bias):
            return f"a token id of logit_bias is outside the vocabulary of {self.vocab_size}"
        if not 0 <= submit.sampling.min_tokens <= submit.max_tokens:
            return f"min_tokens is {submit.sampling.min_tokens}, and the answer has at most {submit.max_tokens} tokens"
        for name in ("logprobs", "prompt_logprobs"):
            if not 0 <= (getattr(submit.sampling, name) or 0) <= MAX_LOGPROBS:
                return f"{name} is {getattr(submit.sampling, name)}, not between 0 and {MAX_LOGPROBS}"
        if (size := len((submit.sampling.grammar or "").encode())) > MAX_GRAMMAR_BYTES:
            return f"the grammar has {size} bytes, more than {MAX_GRAMMAR_BYTES}"
        if len(token_ids) >= self.max_sequence_length:
            return f"{len(token_ids)} tokens leave no room for an answer within {self.max_sequence_length}"
        return None


class Engine:
    """Serves until the process ends: `server.api_link` ends it when the api says so or goes away."""

    def __init__(
        self,
        stage: Stage,
        pipeline: Pipeline,
        scheduler: Scheduler,
        api: ApiLink,
        clock: StageClock,
        limits: RequestLimits,
        ranks: list[RankInfo],
    ) -> None:
        """`ranks`: what each said when it got ready; its heartbeats bring news."""
        self._ranks = ranks
        self._stage = stage
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._api = api
        self._clock = clock
        self._limits = limits
        self._launched_at: dict[int, float] = {}  # frames in flight: seconds of time.perf_counter
        self._num_steps = 0
        self._counted_at = 0.0
        self._counters = SchedulerCounters()
        self._stats = Stats([], num_running=0, num_waiting=0)  # read by the heartbeat's thread

    def run(self) -> NoReturn:
        inbox: queue.SimpleQueue[Any] = self._pipeline.inbox
        while True:
            self._wait(inbox)
            self._drain(inbox)
            while (step := self._scheduler.schedule()) is not None:
                self._note_stats()
                self._launch(step)
                self._drain(inbox)
            if not self._scheduler.num_frames_in_flight:
                self._counted_at = 0.0  # what it is now will stay so
            self._note_stats()

    def _wait(self, inbox: queue.SimpleQueue[Any]) -> None:
        """Not in `run` itself: there the event, with a frame's tensors, would be kept until the next one comes."""
        event = inbox.get()
        self._clock.waited(is_bubble=self._scheduler.num_frames_in_flight > 0)
        self._handle(event)

    def _drain(self, inbox: queue.SimpleQueue[Any]) -> None:
        """What came meanwhile may change what should run next."""
        while not inbox.empty():
            self._handle(inbox.get())

    def _handle(self, event: Submit | Cancel | Arrival) -> None:
        match event:
            case Arrival():
                self._take_result(event)
            case Submit():
                self._submit(event)
            case Cancel(request_id=request_id):
                self._scheduler.cancel(request_id)

    def _launch(self, step: Step) -> None:
        """Run a step's first stage and send it on its way; it comes back to the inbox as an Arrival."""
        if step.started or step.preempted:
            self._api.send(StepOutput(started=step.started, preempted=step.preempted))
        frame = step.frame
        self._launched_at[frame.frame_id] = time.perf_counter()
        token_ids = [_padded(step.token_ids)] if frame.rows else []
        header, arrays = self._stage.run(StepHeader(frame), token_ids)
        self._pipeline.send(encode_header(header), arrays)
        self._clock.computed(frame)

    def _take_result(self, arrival: Arrival) -> None:
        self._pipeline.acknowledge()
        header = decode_header(arrival.header)
        if not isinstance(header, ResultHeader):
            raise TypeError(f"the last rank sent a {type(header).__name__}")
        tensors: list[Any] = [array.tolist() for array in arrival.arrays]
        round_trip_s = time.perf_counter() - self._launched_at.pop(header.frame_id)
        outputs = self._scheduler.complete(header, tensors, round_trip_s)
        self._num_steps += 1
        if outputs:
            self._api.send(StepOutput(outputs=outputs))

    def _submit(self, submit: Submit) -> None:
        """Queue a request, or answer why it cannot be served."""
        if (error := self._limits.problem_of(submit)) is not None:
            self._api.send(StepOutput([SequenceOutput(submit.request_id, finish_reason="error", error=error)]))
        else:
            self._scheduler.add(submit)

    def _note_stats(self) -> None:
        """For the heartbeat. What a frame in flight is must be right before it runs: by that a wedge is seen."""
        now = time.perf_counter()
        if now - self._counted_at > _COUNT_EVERY_S:
            self._counted_at, self._counters = now, self._scheduler.counters()
        self._stats = Stats(
            ranks=[],
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_frames_in_flight=self._scheduler.num_frames_in_flight,
            num_steps=self._num_steps,
            counters=self._counters,
        )

    def send_stats(self, reports: list[bytes]) -> None:
        """Called by the heartbeat with every rank's state, once a second."""
        ranks = decode_reports(reports)
        is_whole = len(ranks) == self._pipeline.ring.size
        if is_whole and all(info.state == READY for info in ranks):  # else it was said before the ring was ready
            self._ranks = ranks
        self._api.send(structs.replace(self._stats, ranks=self._ranks))


def _padded(token_ids: list[list[int]]) -> mx.array:
    """(rows, longest) int32, shorter rows padded at their right."""
    width = max(map(len, token_ids))
    return mx.array([row + [0] * (width - len(row)) for row in token_ids], dtype=mx.int32)
