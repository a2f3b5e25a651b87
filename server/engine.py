"""Rank 0's loop: schedule, run the first stage, take what comes back, tell the api. One screen, top to bottom.

Requests from the api and results from the last rank arrive in one inbox; the loop waits there and nowhere else, so an
idle ring costs nothing. It holds no policy: who runs is the scheduler's business.
"""

from __future__ import annotations

import queue
from typing import Any, NoReturn

import mlx.core as mx
from msgspec import structs

from distributed.fatal import flush_and_exit
from distributed.pipeline import Arrival, Pipeline
from server.api_link import ApiLink
from server.frame import ResultHeader, StepHeader, decode_header, encode_header
from server.protocol import Cancel, SequenceOutput, Shutdown, Stats, StepOutput, Submit
from server.scheduler import Scheduler, Step
from server.stage import Stage
from server.status import READY, decode_reports

_GOODBYE_TIMEOUT_S = 5.0


class Engine:
    """Serves until the api says Shutdown or goes away."""

    def __init__(
        self,
        stage: Stage,
        pipeline: Pipeline,
        scheduler: Scheduler,
        api: ApiLink,
        *,
        vocab_size: int,
        max_sequence_length: int,
    ) -> None:
        self._stage = stage
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._api = api
        self._vocab_size = vocab_size
        self._max_sequence_length = max_sequence_length
        self._num_steps = 0
        self._stats = Stats([], num_running=0, num_waiting=0)  # read by the heartbeat's thread

    def run(self) -> NoReturn:
        inbox: queue.SimpleQueue[Any] = self._pipeline.inbox
        while True:
            self._handle(inbox.get())
            while not inbox.empty():
                self._handle(inbox.get())
            while (step := self._scheduler.schedule()) is not None:
                self._note_stats()
                self._launch(step)
            self._note_stats()

    def _handle(self, event: Submit | Cancel | Shutdown | Arrival) -> None:
        match event:
            case Arrival():
                self._take_result(event)
            case Submit():
                self._submit(event)
            case Cancel(request_id=request_id):
                self._scheduler.cancel(request_id)
            case Shutdown():
                self._pipeline.close(_GOODBYE_TIMEOUT_S)
                flush_and_exit(0)

    def _launch(self, step: Step) -> None:
        """Run a step's first stage and send it on its way; it comes back to the inbox as an Arrival."""
        if step.started:
            self._api.send(StepOutput(started=step.started))
        token_ids = [mx.array(step.token_ids, dtype=mx.int32)] if step.frame.rows else []
        header, arrays = self._stage.run(StepHeader(step.frame), token_ids)
        self._pipeline.send(encode_header(header), arrays)

    def _take_result(self, arrival: Arrival) -> None:
        self._pipeline.acknowledge()
        header = decode_header(arrival.header)
        if not isinstance(header, ResultHeader):
            raise TypeError(f"the last rank sent a {type(header).__name__}")
        sampled: list[int] = arrival.arrays[0].tolist() if arrival.arrays else []  # type: ignore[assignment]
        outputs = self._scheduler.complete(header.frame_id, sampled)
        self._num_steps += 1
        if outputs:
            self._api.send(StepOutput(outputs=outputs))

    def _submit(self, submit: Submit) -> None:
        """Queue a request, or answer why it cannot be served: an id out of range would corrupt memory on the CPU
        backend.
        """
        num_tokens = len(submit.prompt_token_ids) + len(submit.output_token_ids)
        token_ids = [*submit.prompt_token_ids, *submit.output_token_ids]
        error = None
        if not submit.prompt_token_ids:
            error = "the prompt is empty"
        elif not all(0 <= token_id < self._vocab_size for token_id in token_ids):
            error = f"a token id is outside the vocabulary of {self._vocab_size}"
        elif not all(0 <= token_id < self._vocab_size for token_id in submit.sampling.logit_bias):
            error = f"a token id of logit_bias is outside the vocabulary of {self._vocab_size}"
        elif num_tokens >= self._max_sequence_length:
            error = f"{num_tokens} tokens leave no room for an answer within {self._max_sequence_length}"
        if error is not None:
            self._api.send(StepOutput([SequenceOutput(submit.request_id, finish_reason="error", error=error)]))
        else:
            self._scheduler.add(submit)

    def _note_stats(self) -> None:
        self._stats = Stats(
            ranks=[],
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_frames_in_flight=self._scheduler.num_frames_in_flight,
            num_steps=self._num_steps,
        )

    def send_stats(self, reports: list[bytes]) -> None:
        """Called by the heartbeat with every rank's state, once a second."""
        ranks = decode_reports(reports)
        if any(info.state != READY for info in ranks):  # said before the ring was ready, and still on its way round
            return
        self._api.send(structs.replace(self._stats, ranks=ranks))
