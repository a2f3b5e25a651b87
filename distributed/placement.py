"""Which layers each rank of a ring gets, what it would hold of the model, and what part of a step it would take.

Layers are weighed by the seconds that they were measured to take (`layer_times`), or, until there are any, by the bytes
that a decode step reads; memory binds in both cases. It is arithmetic over numbers it is given: it never looks at a
machine or imports mlx. `plan` calls it, and rank 0 at start-up.

What lies besides the layers, the head above all, computes for tokens of answers and not for those of prompts. It counts
by the share that answers have: with all of its cost the last rank would get too few layers for reading prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distributed.errors import PartitionError
from distributed.layer_times import RingTimes, StepCosts
from distributed.model_files import ModelInfo
from distributed.partition import LayerRange, explicit_split, split_layers

MIB = 2**20
_SHARE_OF_ANSWERS = 0.25  # of the tokens that pass the layers; prompts are mostly longer


@dataclass(frozen=True)
class StagePlan:
    """What one rank would hold. Sizes in bytes."""

    rank: int
    layer_range: LayerRange
    weight_bytes: int
    kv_reserved_bytes: int  # ceiling of the KV cache
    kv_bytes_per_token: int  # an estimate, over the stage's layers
    memory_limit: int | None
    step_cost: float  # of a step, the head by its share: seconds where times are known, else the bytes it reads

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
    times: RingTimes | None = None,
) -> tuple[StagePlan, ...]:
    """What each rank would hold, whether it fits or not: ask `StagePlan.fits`, or `check_fits` for the error.

    Without `layer_split` the slowest stage is made as fast as it can be under `memory_limits`: bytes each rank may hold
    in all, KV cache included. `times` are of this model and of these ranks.

    Raises:
        PartitionError: more ranks than layers, or a `layer_split` that does not add up.
    """
    costs = times.step_costs(info.layer_bytes) if times is not None else costs_by_bytes(info, num_stages)
    costs = StepCosts(costs.layers, [_SHARE_OF_ANSWERS * cost for cost in costs.others])
    if layer_split:
        ranges = explicit_split(layer_split, info.num_layers, num_stages)
    else:
        limits = [limit - kv_reserved_bytes for limit in memory_limits] if memory_limits is not None else None
        try:
            ranges = _split(info, costs, limits)
        except PartitionError:
            ranges = _split(info, costs, None)  # shows how much is lacking; some stage will not fit
    return tuple(
        StagePlan(
            rank=rank,
            layer_range=layer_range,
            weight_bytes=info.stage_bytes(layer_range),
            kv_reserved_bytes=kv_reserved_bytes,
            kv_bytes_per_token=info.kv_bytes_per_token_layer * len(layer_range),
            memory_limit=memory_limits[rank] if memory_limits is not None else None,
            step_cost=costs.of_stage(rank, layer_range),
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


def shares(plans: Sequence[StagePlan]) -> list[float]:
    """Each stage's part of a step, together 1."""
    total = sum(plan.step_cost for plan in plans)
    return [plan.step_cost / total if total else 1 / len(plans) for plan in plans]


def imbalance(plans: Sequence[StagePlan]) -> float:
    """The slowest stage against the mean of all: 1 is perfect, and P times 1 / this is what a ring of P can reach."""
    return max(shares(plans)) * len(plans)


def costs_by_bytes(info: ModelInfo, num_stages: int) -> StepCosts:
    """Before anything is known of the machines: they are alike, and a step costs what it reads, layers and head."""
    others = [0.0] * (num_stages - 1) + [float(info.last_stage_bytes)]
    return StepCosts([list(map(float, info.layer_bytes))] * num_stages, others)


def _split(info: ModelInfo, costs: StepCosts, limits: Sequence[int] | None) -> tuple[LayerRange, ...]:
    last = len(costs.layers) - 1
    return split_layers(
        costs.layers,
        other_costs=costs.others,
        layer_bytes=info.layer_bytes,
        other_bytes=[info.bytes_besides_layers(is_first=r == 0, is_last=r == last) for r in range(last + 1)],
        memory_limits=limits,
    )
