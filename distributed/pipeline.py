"""The data plane of one rank: takes frames from the left neighbour, gives frames to the right one.

Three threads besides the caller's: a receiver (waits for an envelope, then evaluates the ring recv), a sender (waits
for a credit, then sends envelope and tensors) and a reader of what flows back from the right. The caller computes;
only evaluated arrays cross threads, and no graph holds both a computation and a transfer. A ring of one is the same
object with its right hand in its own left. When a neighbour is lost the process ends (`distributed.fatal`), and what
ends it goes round the ring as its last words: nothing is retried.
"""

from __future__ import annotations

import faulthandler
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from distributed.control import HEARTBEAT_INTERVAL_S, PEER_SILENCE_S, STARTING_SILENCE_S, Connection
from distributed.errors import RingError
from distributed.fatal import die_of_hearing, flush_and_exit, start_thread, tell_at_the_end
from distributed.frames import Credit, DumpStacks, Envelope, Goodbye, Heartbeat, Lap, LastWords, TensorSpec
from distributed.ring import Ring
from distributed.stacks import stacks_of_all_threads

_GOODBYE_WAIT_S = 1.0
INBOX_SLOTS = 8  # frames a rank accepts before it computes; more only moves the queue downstream
_FRAMES_A_CREDIT = 4  # slots given back at once: a message for each is a tenth of what a short frame takes
# Tensors up to this size are sent before they are announced, so that the receiver's recv finds them there and does not
# spin for them. They fit into any socket's buffers; larger ones would wait in the sender for a recv that nobody posts.
_SENT_AHEAD_BYTES = 64 * 1024

logger = logging.getLogger(__name__)


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
        # Rank 0: takes every rank's latest state each second; its own alone where nothing has come round yet.
        self.on_reports: Callable[[list[bytes]], None] | None = None
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
        self._silence_s = STARTING_SILENCE_S  # what the neighbours are told to bear
        self._stacks_lock = threading.Lock()
        self._num_stacks = 0  # times that the stacks of all ranks were asked for

    def start(self) -> None:
        """Start the threads. From now on the end of a neighbour is the end of this process."""
        tell_at_the_end(self._say_last_words)
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

    def serves(self) -> None:
        """This rank's start is over: from now on, and from this moment, it is missed sooner."""
        self._silence_s = PEER_SILENCE_S
        self._beat()

    def dump_stacks(self, reason: str) -> None:
        """Rank 0: have every rank log what its threads are doing. Does not wait for it."""
        message = DumpStacks(self._num_stacks + 1, reason)
        for neighbour in (self._left, self._right):
            if neighbour is not None:
                neighbour.send(message)
        self._log_stacks(message)

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
                case Lap():
                    self._laps.put(message)
                case LastWords():
                    die_of_hearing(message)
                case DumpStacks():
                    self._pass_on(message, self._right)
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
                case LastWords():
                    die_of_hearing(message)
                case DumpStacks():
                    self._pass_on(message, self._left)
                case _:
                    raise RingError(f"rank {right.peer} sent {type(message).__name__} the wrong way round the ring")

    def _send_forever(self, right: Connection) -> None:
        while True:
            # In a function of its own, so that no frame's tensors are kept while there is nothing to send.
            self._send_frame(right, *self._outbox.get())

    def _send_frame(self, right: Connection, header: bytes, arrays: Sequence[mx.array]) -> None:
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
        while not self._is_closing.is_set():
            try:
                self._beat()
            except RingError:
                if self._is_closing.is_set():
                    return
                raise
            time.sleep(HEARTBEAT_INTERVAL_S)

    def _beat(self) -> None:
        # Whoever keeps this rank from its next beat is named in the log before the neighbours lose patience.
        faulthandler.dump_traceback_later(0.8 * self._silence_s)
        reports = [*self._reports_from_left, self._report()] if self.ring.rank else [self._report()]
        if self._left is not None and self._right is not None:
            self._left.send(Heartbeat(self._silence_s))
            self._right.send(Heartbeat(self._silence_s, reports))
        if self.on_reports is not None:  # by this rank's own clock: the api takes its silence for its end
            self.on_reports(self._reports_from_left or reports)

    def _pass_on(self, message: DumpStacks, neighbour: Connection | None) -> None:
        if neighbour is not None and neighbour.peer:  # rank 0 asked
            neighbour.send(message)
        self._log_stacks(message)

    def _log_stacks(self, message: DumpStacks) -> None:
        """Once, however often the message comes by."""
        with self._stacks_lock:
            if message.number == self._num_stacks:
                return
            self._num_stacks = message.number
        logger.warning("stacks of all threads, because %s:\n%s", message.reason, stacks_of_all_threads())

    def _say_last_words(self, words: LastWords) -> None:
        for neighbour in (self._left, self._right):
            if neighbour is not None:
                neighbour.say_last(words)


def tensor_spec(array: mx.array) -> TensorSpec:
    """What the receiver must know to post its recv."""
    return TensorSpec(tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))
