"""The data plane of one rank: takes frames from the left neighbour, gives frames to the right one.

Three threads besides the caller's: a receiver (waits for an envelope, then evaluates the ring recv), a sender (waits
for a credit, then sends envelope and tensors) and a reader of what flows back from the right. The caller computes;
only evaluated arrays cross threads, and no graph holds both a computation and a transfer. A ring of one is the same
object with its right hand in its own left. When a neighbour is lost the process ends (`distributed.fatal`): nothing
is retried.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from distributed.control import HEARTBEAT_INTERVAL_S, Connection
from distributed.errors import RingError
from distributed.fatal import flush_and_exit, start_thread
from distributed.frames import Credit, Envelope, Goodbye, Heartbeat, Lap, TensorSpec
from distributed.ring import Ring

_GOODBYE_WAIT_S = 1.0
INBOX_SLOTS = 8  # frames a rank accepts before it computes; more only moves the queue downstream
_FRAMES_A_CREDIT = 4  # slots given back at once: a message for each is a tenth of what a short frame takes
# Tensors up to this size are sent before they are announced, so that the receiver's recv finds them there and does not
# spin for them. They fit into any socket's buffers; larger ones would wait in the sender for a recv that nobody posts.
_SENT_AHEAD_BYTES = 64 * 1024


class Arrival(NamedTuple):
    """A frame that came from the left: its header and its tensors, evaluated. Owes one `acknowledge`."""

    header: bytes
    arrays: list[mx.array]


class Pipeline:
    """The threads and queues of one rank, between its two neighbours (None, both, in a ring of one).

    `inbox` receives an `Arrival` for each frame; rank 0 hands in a queue that gets its other events too. `report` is
    asked each second for this rank's state, which travels with the heartbeat to rank 0.
    """

    def __init__(
        self,
        ring: Ring,
        left: Connection | None,
        right: Connection | None,
        inbox: queue.SimpleQueue[Any],
        report: Callable[[], bytes],
    ) -> None:
        self.ring = ring
        self.inbox = inbox
        self._report = report
        self.on_reports: Callable[[list[bytes]], None] | None = None  # rank 0: every rank's latest state
        self.receiving_s = 0.0  # evaluating recvs since the start; each of the two has one thread that writes it
        self.sending_s = 0.0  # the same of sends, the wait for a credit left out
        self._left, self._right = left, right
        self._outbox: queue.SimpleQueue[tuple[bytes, Sequence[mx.array]]] = queue.SimpleQueue()
        self._credits = threading.Semaphore(INBOX_SLOTS)
        self._num_free = 0  # slots that the left neighbour does not know of yet
        self._laps: queue.SimpleQueue[Lap] = queue.SimpleQueue()
        self._reports_from_left: list[bytes] = []
        self._is_closing = threading.Event()  # neighbours may go now
        self._goodbye_is_back = threading.Event()
        self._right_is_gone = threading.Event()

    def start(self) -> None:
        """Start the threads. From now on the end of a neighbour is the end of this process."""
        if self._left is not None and self._right is not None:
            start_thread("receiver", self._receive_forever, self._left)
            start_thread("sender", self._send_forever, self._right)
            start_thread("right-reader", self._read_right_forever, self._right)
        start_thread("heartbeat", self._beat_forever)

    def send(self, header: bytes, arrays: Sequence[mx.array]) -> None:
        """Pass a frame on to the right; never blocks. `arrays` must be evaluated."""
        if self._right is None:
            self.inbox.put(Arrival(header, list(arrays)))
        else:
            self._outbox.put((header, arrays))

    def acknowledge(self) -> None:
        """Give the left neighbour the slot of one `Arrival` back: the frame is about to be computed."""
        self._num_free += 1
        if self._left is not None and self._num_free == _FRAMES_A_CREDIT:
            self._num_free = 0
            self._left.send(Credit(_FRAMES_A_CREDIT))

    def lap(self, record: bytes) -> list[bytes]:
        """Start-up: exchange one record with every rank, in rank order, without spinning. Every rank calls this
        alike.
        """
        if self._right is None:
            return [record]
        if self.ring.rank == 0:
            self._right.send(Lap([record], complete=False))
            everyone = self._laps.get()
            self._right.send(Lap(everyone.records, complete=True))
            return everyone.records
        upstream = self._laps.get()
        self._right.send(Lap([*upstream.records, record], complete=False))
        everyone = self._laps.get()
        if not self.ring.is_last:
            self._right.send(everyone)
        return everyone.records

    def close(self, timeout_s: float) -> None:
        """Rank 0: tell every rank to end, and wait until the word has gone round. The others exit by themselves."""
        self._is_closing.set()
        if self._right is not None:
            self._right.send(Goodbye())
            self._goodbye_is_back.wait(timeout_s)

    def _receive_forever(self, left: Connection) -> None:
        while True:
            try:
                message = left.receive()
            except RingError:
                if self._is_closing.is_set():
                    return
                raise
            match message:
                case Goodbye():
                    self._take_leave()
                    return
                case Envelope(header=header, tensors=tensors):
                    self.inbox.put(Arrival(header, self._receive(tensors)))
                case Heartbeat(reports=reports):
                    self._reports_from_left = reports
                    if self.on_reports is not None:
                        self.on_reports(reports)
                case Lap():
                    self._laps.put(message)
                case _:
                    raise RingError(f"rank {left.peer} sent {type(message).__name__} the wrong way round the ring")

    def _receive(self, tensors: Sequence[TensorSpec]) -> list[mx.array]:
        if not tensors:
            return []
        began = time.perf_counter()
        arrays = self.ring.receive(tensors)
        self.receiving_s += time.perf_counter() - began
        return arrays

    def _take_leave(self) -> None:
        self._is_closing.set()
        if self.ring.rank == 0:
            self._goodbye_is_back.set()
            return
        if self._right is not None:
            self._right.send(Goodbye())
            # Closing with unread bytes would reset the connection, and the goodbye might be lost with them.
            self._right_is_gone.wait(_GOODBYE_WAIT_S)
        flush_and_exit(0)

    def _read_right_forever(self, right: Connection) -> None:
        while True:
            try:
                message = right.receive()
            except RingError:
                if self._is_closing.is_set():
                    self._right_is_gone.set()
                    return
                raise
            match message:
                case Credit(count=count):
                    self._credits.release(count)
                case Heartbeat():
                    pass
                case _:
                    raise RingError(f"rank {right.peer} sent {type(message).__name__} the wrong way round the ring")

    def _send_forever(self, right: Connection) -> None:
        while True:
            header, arrays = self._outbox.get()
            self._credits.acquire()
            began = time.perf_counter()
            envelope = Envelope(header, [tensor_spec(array) for array in arrays])
            if 0 < sum(array.nbytes for array in arrays) <= _SENT_AHEAD_BYTES:
                self.ring.send(arrays)
                right.send(envelope)
            else:
                right.send(envelope)
                if arrays:
                    self.ring.send(arrays)
            self.sending_s += time.perf_counter() - began

    def _beat_forever(self) -> None:
        while True:
            reports = [*self._reports_from_left, self._report()] if self.ring.rank else [self._report()]
            if self._is_closing.is_set():
                return
            if self._left is not None and self._right is not None:
                self._left.send(Heartbeat())
                self._right.send(Heartbeat(reports))
            elif self.on_reports is not None:
                self.on_reports(reports)
            time.sleep(HEARTBEAT_INTERVAL_S)


def tensor_spec(array: mx.array) -> TensorSpec:
    """What the receiver must know to post its recv."""
    return TensorSpec(tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))
