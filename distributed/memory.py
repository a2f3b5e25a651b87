"""How much memory a rank may use, and what each rank of a planned ring would hold of a model.

The first half reads this machine; the second half, `plan_stages`, is arithmetic over numbers it is given, for `plan`
and for rank 0 at start-up. This module never imports mlx (it asks it only where a rank has loaded it) and reserves
nothing.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from distributed.errors import PartitionError
from distributed.model_files import ModelInfo
from distributed.partition import LayerRange, explicit_split, split_layers

MIB = 2**20
# Of a Mac's memory, the GPU may keep about this much wired by default. From Apple's description of
# recommendedMaxWorkingSetSize and users' reports; not measured here. Used only where mlx cannot be asked.
MACOS_SHARE = 0.7


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


def available_memory_bytes() -> int:
    """Memory of this machine that a new process may take now without swapping, within `total_memory_bytes`."""
    return min(psutil.virtual_memory().available, total_memory_bytes())


def rank_memory_limit_bytes(rank: int, local_ranks: int, rank_memory_limit_mb: Sequence[int] = ()) -> int:
    """What one rank of this machine may hold in all, before any rank has loaded anything.

    `local_ranks` ranks share what is available; RANK_MEMORY_LIMIT_MB (empty, one value for all, or one a rank) caps it.
    """
    share = available_memory_bytes() // max(1, local_ranks)
    cap = configured_limit_bytes(rank, rank_memory_limit_mb)
    return share if cap is None else min(share, cap)


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


@dataclass(frozen=True)
class StagePlan:
    """What one rank would hold. Sizes in bytes."""

    rank: int
    layer_range: LayerRange
    weight_bytes: int
    kv_reserved_bytes: int  # ceiling of the KV cache
    kv_bytes_per_token: int  # an estimate, over the stage's layers
    memory_limit: int | None

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that the ceiling holds; None where the cache does not grow with tokens."""
        return self.kv_reserved_bytes // self.kv_bytes_per_token if self.kv_bytes_per_token else None

    @property
    def fits(self) -> bool:
        return self.memory_limit is None or self.weight_bytes + self.kv_reserved_bytes <= self.memory_limit


def plan_stages(
    info: ModelInfo,
    num_stages: int,
    memory_limits: Sequence[int] | None,
    kv_reserved_bytes: int,
    layer_split: Sequence[int] = (),
) -> tuple[StagePlan, ...]:
    """What each rank would hold, whether it fits or not: ask `StagePlan.fits`, or `check_fits` for the error.

    Without `layer_split` the layers are placed by the bytes a decoding step reads on each stage (its layers, and the
    head on the last), under `memory_limits`: bytes each rank may hold in all, KV cache included.

    Raises:
        PartitionError: more ranks than layers, or a `layer_split` that does not add up.
    """
    if layer_split:
        ranges = explicit_split(layer_split, info.num_layers, num_stages)
    else:
        limits = [limit - kv_reserved_bytes for limit in memory_limits] if memory_limits is not None else None
        try:
            ranges = _split_by_bytes(info, num_stages, limits)
        except PartitionError:
            ranges = _split_by_bytes(info, num_stages, None)  # shows how much is lacking; some stage will not fit
    return tuple(
        StagePlan(
            rank=rank,
            layer_range=layer_range,
            weight_bytes=info.stage_bytes(layer_range),
            kv_reserved_bytes=kv_reserved_bytes,
            kv_bytes_per_token=info.kv_bytes_per_token_layer * len(layer_range),
            memory_limit=memory_limits[rank] if memory_limits is not None else None,
        )
        for rank, layer_range in enumerate(ranges)
    )


def check_fits(plans: Sequence[StagePlan]) -> None:
    """Raises PartitionError, naming rank, sizes and the keys to change, unless every stage fits."""
    for plan in plans:
        if not plan.fits and plan.memory_limit is not None:
            raise PartitionError(
                f"Rank {plan.rank} has {plan.memory_limit / MIB:,.0f} MiB, but its layers {plan.layer_range} take "
                f"{plan.weight_bytes / MIB:,.0f} MiB and the KV cache up to {plan.kv_reserved_bytes / MIB:,.0f} MiB: "
                "lower KV_CACHE_RESERVED_MEMORY_MB, add a machine to WORKER_HOSTS, raise RANK_MEMORY_LIMIT_MB if it is "
                "set, or choose a smaller MODEL_REPO."
            )


def _split_by_bytes(info: ModelInfo, num_stages: int, limits: Sequence[int] | None) -> tuple[LayerRange, ...]:
    return split_layers(
        info.layer_bytes,
        num_stages,
        last_cost=info.last_stage_bytes,
        layer_bytes=info.layer_bytes,
        first_bytes=info.first_stage_bytes,
        last_bytes=info.last_stage_bytes,
        shared_bytes=info.shared_bytes,
        middle_bytes=info.middle_stage_bytes,
        memory_limits=limits,
    )
