"""What one rank says of itself each second: its part of /health. Filled in as start-up goes on, read by the
heartbeat.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import mlx.core as mx
import msgspec

from distributed.memory import MIB
from server.errors import OutOfMemory
from server.protocol import RankInfo, StageCounters

READY = "ready"


class RankStatus:
    """The mutable facts behind `RankInfo`; numbers are read from MLX when asked."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.host = socket.gethostname()
        self.layers: tuple[int, int] = (0, 0)
        self.kv_cache_bytes_limit = 0
        self.kv_cache_bytes: Callable[[], int] = int
        self.prefix_cache_bytes: Callable[[], int] = int
        self.counters: Callable[[], StageCounters] = StageCounters
        self.state = "starting"

    def info(self) -> RankInfo:
        return RankInfo(
            rank=self.rank,
            host=self.host,
            pid=os.getpid(),
            layers=self.layers,
            memory_bytes=mx.get_active_memory(),
            kv_cache_bytes=self.kv_cache_bytes(),
            kv_cache_bytes_limit=self.kv_cache_bytes_limit,
            peak_memory_bytes=mx.get_peak_memory(),
            state=self.state,
            prefix_cache_bytes=self.prefix_cache_bytes(),
            counters=self.counters(),
        )

    def out_of_memory(self, error: BaseException) -> OutOfMemory:
        """What to say of a failed allocation: what was held, and which keys ask for less."""
        kv_bytes, limit_bytes = self.kv_cache_bytes(), self.kv_cache_bytes_limit
        return OutOfMemory(
            f"out of memory: {str(error) or type(error).__name__}. MLX held {mx.get_active_memory() / MIB:.0f} MiB, "
            f"{kv_bytes / MIB:.0f} MiB of it KV cache, which may grow to {limit_bytes / MIB:.0f} MiB. Lower "
            "KV_CACHE_RESERVED_MEMORY_MB, MAX_SEQUENCE_LENGTH or PREFILL_CHUNK_TOKENS, or give this rank fewer layers "
            "(LAYER_SPLIT)"
        )

    def report(self) -> bytes:
        return msgspec.msgpack.encode(self.info())


def decode_reports(reports: list[bytes]) -> list[RankInfo]:
    """The heartbeat's reports as the api knows them."""
    return [msgspec.msgpack.decode(report, type=RankInfo) for report in reports]
