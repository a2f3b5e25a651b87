"""MLX's ring, as far as we use it: join it, gather bytes at start-up, send arrays right, receive arrays from the left.

Everything here blocks the calling thread and evaluates on that thread's own CPU stream: network and compute never
share a graph (on Metal a command buffer that waits for a socket is killed, mlx#3830). A pending recv spins a core, so
`receive` is only called when the control connection has announced a tensor. Errors of the ring are final for the
process.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from distributed.errors import RingError
from distributed.frames import TensorSpec

_GATHER_BYTES = 8192  # all_gather wants equal shapes; a rank's start-up record fits
_local = threading.local()


@dataclass(frozen=True)
class Ring:
    """This process's place in the ring. `addresses` holds each rank's host part, empty for a ring of one."""

    rank: int
    size: int
    addresses: tuple[str, ...]
    group: mx.distributed.Group | None  # a ring of one needs none (and MLX cannot read the empty file it is given)

    @property
    def left(self) -> int:
        return (self.rank - 1) % self.size

    @property
    def right(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @classmethod
    def join(cls) -> Ring:
        """Join the ring that mlx.launch described in MLX_HOSTFILE and MLX_RANK; a ring of one without.

        Blocks until the neighbours are there. A connector gives up after about 31 s, an acceptor never does; the
        supervisor's START_TIMEOUT bounds both.

        Raises:
            RingError: the neighbour did not appear, or the environment is incomplete.
        """
        addresses = _addresses()
        if len(addresses) <= 1:
            return cls(0, 1, (), None)
        try:
            group = mx.distributed.init(strict=True, backend="ring")
        except (RuntimeError, ValueError) as error:
            rank = os.environ.get("MLX_RANK", "?")
            raise RingError(f"rank {rank} could not join the ring of {', '.join(addresses)}: {error}") from error
        hosts = tuple(address.rsplit(":", 1)[0] for address in addresses)
        return cls(group.rank(), group.size(), hosts, group)

    def gather(self, record: bytes) -> list[bytes]:
        """Every rank's `record` (at most 8 KiB), in rank order. Spins while it waits: for the moment of start-up
        only.
        """
        if self.size == 1:
            return [record]
        padded = len(record).to_bytes(4, "big") + record
        if len(padded) > _GATHER_BYTES:
            raise RingError(f"a start-up record of {len(record)} bytes is over the limit of {_GATHER_BYTES - 4}")
        padded = padded.ljust(_GATHER_BYTES, b"\0")
        with mx.stream(_cpu_stream()):
            gathered = mx.distributed.all_gather(mx.array(list(padded), dtype=mx.uint8), group=self.group)
            mx.eval(gathered)
        data = bytes(gathered.tolist())  # type: ignore[arg-type]
        parts = [data[i : i + _GATHER_BYTES] for i in range(0, len(data), _GATHER_BYTES)]
        return [part[4 : 4 + int.from_bytes(part[:4], "big")] for part in parts]

    def send(self, arrays: Sequence[mx.array]) -> None:
        """Send evaluated `arrays` to the right neighbour, in order. Returns when the last byte is in the socket."""
        stream = _cpu_stream()
        mx.eval([mx.distributed.send(array, self.right, group=self.group, stream=stream) for array in arrays])

    def receive(self, specs: Sequence[TensorSpec]) -> list[mx.array]:
        """The arrays that the left neighbour sends next, evaluated."""
        stream = _cpu_stream()
        arrays = [
            mx.distributed.recv(spec.shape, getattr(mx, spec.dtype), self.left, group=self.group, stream=stream)
            for spec in specs
        ]
        mx.eval(arrays)
        return arrays


def _cpu_stream() -> mx.Stream:
    """The calling thread's own stream: MLX's streams belong to the thread that made them."""
    if not hasattr(_local, "stream"):
        _local.stream = mx.new_stream(mx.cpu)
    return _local.stream


def _addresses() -> list[str]:
    """First address of each rank, "host:port", from the file that mlx.launch wrote; empty for a ring of one."""
    hostfile = os.environ.get("MLX_HOSTFILE", "")
    text = Path(hostfile).read_text().strip() if hostfile else ""
    return [addresses[0] for addresses in json.loads(text)] if text else []
