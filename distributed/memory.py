"""How much memory a rank of this machine may use, and how a process keeps its own small.

It never imports mlx (it asks it only where a rank has loaded it) and reserves nothing. Every rank asks at start-up,
`plan` for this machine.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence

import psutil

from distributed.errors import PartitionError

MIB = 2**20
# Of a Mac's memory, the GPU may keep about this much wired by default. From Apple's description of
# recommendedMaxWorkingSetSize and users' reports; not measured here. Used only where mlx cannot be asked.
MACOS_SHARE = 0.7
_M_ARENA_MAX = -8  # of mallopt, from <malloc.h>


def share_one_heap() -> None:
    """Let all threads of this process allocate from one heap; before there are any.

    glibc gives each its own, which keeps the most that this thread ever needed. Prompts are read, and grammars
    compiled, by whichever thread of a pool is free, so the peaks of one would serve the next.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def total_memory_bytes() -> int:
    """Memory of this machine that a model may take, whoever uses it now.

    On macOS that is Metal's recommended working set (from MLX's documentation, not tried on a Mac yet).
    """
    total = psutil.virtual_memory().total
    if platform.system() != "Darwin":
        return total
    mx = sys.modules.get("mlx.core")
    recommended = mx.device_info().get("max_recommended_working_set_size") if mx is not None else None
    return int(recommended or total * MACOS_SHARE)


def available_memory_bytes(freed_bytes: int = 0) -> int:
    """Memory of this machine that a new process may take without swapping, within `total_memory_bytes`.

    `freed_bytes`: what others hold now and will have given back by then.
    """
    return min(psutil.virtual_memory().available + freed_bytes, total_memory_bytes())


def rank_memory_limit_bytes(rank: int, local_ranks: int, rank_memory_limit_mb: Sequence[int] = ()) -> int:
    """What one rank of this machine may hold in all, before any rank has loaded anything.

    `local_ranks` ranks share what is available; RANK_MEMORY_LIMIT_MB (empty, one value for all, or one a rank) caps it.
    """
    share = available_memory_bytes() // max(1, local_ranks)
    cap = configured_limit_bytes(rank, rank_memory_limit_mb)
    return share if cap is None else min(share, cap)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether Python or MLX could not get memory that it asked for. MLX has no error of its own for it."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("malloc]" in text or "Insufficient Memory" in text)
    )


def configured_limit_bytes(rank: int, rank_memory_limit_mb: Sequence[int]) -> int | None:
    """RANK_MEMORY_LIMIT_MB for one rank; None where it is not set.

    Raises:
        PartitionError: it is a list that has no entry for this rank.
    """
    if not rank_memory_limit_mb:
        return None
    if len(rank_memory_limit_mb) == 1:
        return rank_memory_limit_mb[0] * MIB
    if rank >= len(rank_memory_limit_mb):
        raise PartitionError(
            f"RANK_MEMORY_LIMIT_MB has {len(rank_memory_limit_mb)} entries, but the ring has a rank {rank}: give one "
            "value for all ranks, or one for each."
        )
    return rank_memory_limit_mb[rank] * MIB
