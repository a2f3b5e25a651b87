"""Which decoder layers go to which stage of the ring: plain arithmetic over costs, bytes and limits.

A split gives every stage one contiguous, non-empty, half-open range of layers, in ring order, and is as fast as its
slowest stage. This module must never look at a machine, a file or mlx: `placement.plan_stages`, which calls it, brings
the numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from distributed.errors import PartitionError


@dataclass(frozen=True, slots=True)
class LayerRange:
    """The layers [start, end) of a model."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a range of layers: [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.end

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"


def split_layers(
    layer_costs: Sequence[Sequence[float]],
    *,
    other_costs: Sequence[float] = (),
    layer_bytes: Sequence[int] = (),
    other_bytes: Sequence[int] = (),
    memory_limits: Sequence[int] | None = None,
) -> tuple[LayerRange, ...]:
    """The split whose slowest stage is fastest, among those that fit every stage's memory.

    Of splits with equally fast slowest stages the most even one is taken.

    Args:
        layer_costs: `layer_costs[stage][layer]`, in any one unit (seconds of a step, or bytes to read).
        other_costs: what each stage has to do besides its layers, in the same unit: embeddings, head.
        layer_bytes: what each layer takes.
        other_bytes: what each stage holds besides its layers.
        memory_limits: bytes for the weights of each stage: what the KV cache may take is already subtracted.

    Raises:
        PartitionError: there are more stages than layers, or no split fits the limits.
    """
    num_stages, num_layers = len(layer_costs), len(layer_costs[0])
    check_num_stages(num_layers, num_stages)
    costs_before = [_prefix_sums(costs) for costs in layer_costs]
    bytes_before = _prefix_sums(layer_bytes or [0] * num_layers)
    other_costs = other_costs or [0] * num_stages
    other_bytes = other_bytes or [0] * num_stages
    limits = memory_limits if memory_limits is not None else [math.inf] * num_stages
    if any(len(costs) != len(bytes_before) for costs in costs_before):
        raise ValueError("costs and sizes are not of the same number of layers")
    if not len(other_costs) == len(other_bytes) == len(limits) == num_stages:
        raise ValueError("costs, sizes and limits are not of the same number of stages")

    def cost(stage: int, start: int, end: int) -> float:
        """Cost of layers [start, end) on `stage`; infinite where they do not fit."""
        if bytes_before[end] - bytes_before[start] + other_bytes[stage] > limits[stage]:
            return math.inf
        return costs_before[stage][end] - costs_before[stage][start] + other_costs[stage]

    slowest, _ = _best_split(num_layers, num_stages, cost, max)
    if math.isinf(slowest):
        raise PartitionError(_does_not_fit(bytes_before[-1] + sum(other_bytes), memory_limits or ()))
    bound = slowest * (1 + 1e-9)  # sums of floats differ in their last bits

    def unevenness(stage: int, start: int, end: int) -> float:
        value = cost(stage, start, end)
        return value * value if value <= bound else math.inf

    _, ranges = _best_split(num_layers, num_stages, unevenness, lambda left, right: left + right)
    return ranges


def explicit_split(counts: Sequence[int], num_layers: int, num_stages: int) -> tuple[LayerRange, ...]:
    """LAYER_SPLIT as ranges: `counts[i]` layers for stage i.

    Raises:
        PartitionError: the counts do not match the stages or the layers; says what they come to and what they must.
    """
    shown = f"LAYER_SPLIT={','.join(map(str, counts))}"
    if len(counts) != num_stages:
        raise PartitionError(
            f"{shown} has {len(counts)} entries, but the ring has {num_stages} "
            f"rank{'s' if num_stages != 1 else ''}: give one number of layers for each rank, or LAYER_SPLIT=auto."
        )
    if any(count < 1 for count in counts):
        raise PartitionError(f"{shown} leaves a rank without layers: each entry must be at least 1.")
    if sum(counts) != num_layers:
        raise PartitionError(
            f"{shown} adds up to {sum(counts)} layers, but the model has {num_layers}: "
            f"the entries must add up to {num_layers}, or set LAYER_SPLIT=auto."
        )
    ends = _prefix_sums(counts)
    return tuple(LayerRange(start, end) for start, end in itertools.pairwise(ends))


def check_num_stages(num_layers: int, num_stages: int) -> None:
    """Raises PartitionError unless every stage can have a layer."""
    if num_stages < 1:
        raise ValueError("a ring has at least one stage")
    if num_stages > num_layers:
        raise PartitionError(
            f"The model has {num_layers} layers, too few for {num_stages} ranks with at least one each: set "
            f"RING_SIZE to at most {num_layers}, or name fewer machines in WORKER_HOSTS or HOSTFILE."
        )


def _best_split(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, tuple[LayerRange, ...]]:
    """The least combined cost and the ranges that reach it: dynamic programming over stages and layers given away."""
    best = [math.inf] * (num_layers + 1)  # best[end]: the stages so far hold layers [0, end)
    best[0] = -math.inf if combine is max else 0.0
    choices: list[list[int]] = []
    for stage in range(num_stages):
        following, choice = [math.inf] * (num_layers + 1), [stage] * (num_layers + 1)
        layers_left_for_others = num_stages - stage - 1
        for end in range(stage + 1, num_layers - layers_left_for_others + 1):
            candidates = ((combine(best[start], cost(stage, start, end)), start) for start in range(stage, end))
            following[end], choice[end] = min(candidates)
        best = following
        choices.append(choice)
    ranges: list[LayerRange] = []
    end = num_layers
    for choice in reversed(choices):
        ranges.append(LayerRange(choice[end], end))
        end = choice[end]
    return best[num_layers], tuple(reversed(ranges))


def _prefix_sums(values: Sequence) -> list:
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def _does_not_fit(needed: int, memory_limits: Sequence[int]) -> str:
    limits = ", ".join(f"{limit / 2**20:,.0f}" for limit in memory_limits)
    return (
        f"The model's weights ({needed / 2**20:,.0f} MiB) do not fit: the ranks have room for {limits} MiB of weights, "
        "and no split of whole layers stays within that. Add a machine to WORKER_HOSTS, lower "
        "KV_CACHE_RESERVED_MEMORY_MB, raise RANK_MEMORY_LIMIT_MB, or choose a smaller MODEL_REPO."
    )
