"""Where the layers go at start-up, and the measuring that it takes on a ring that has never run the model.

Rank 0 decides, from times that it remembers or, the first time, from bytes; then every rank times what it was given,
and rank 0 may decide again. Nothing here loads weights or talks to other ranks: `startup` calls it, lap by lap.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import msgspec

from config import Settings
from distributed.errors import ModelError
from distributed.layer_times import RingTimes, StageTimes, recall, remember, times_file
from distributed.model_files import ModelInfo
from distributed.placement import StagePlan, check_fits, plan_stages, shares
from distributed.ring import Ring
from distributed.shard.measure import measure_stage
from distributed.shard.stage_model import StageModel
from server.kv_budget import MIB
from server.protocol import SamplingParams
from server.sampler import Sampler

_WORTH_LOADING_AGAIN = 1.05  # how much slower the slowest stage may be than it could be

logger = logging.getLogger(__name__)


class Split(msgspec.Struct, frozen=True):
    """Each rank's layers [start, end), and whether times would tell better. Empty from ranks that do not decide."""

    ranges: list[tuple[int, int]] = []
    is_guess: bool = False


class Placing:
    """One rank's part in it.

    Args:
        memory_limits: bytes that each rank may hold.
        machines: each rank's machine; ranks of the same one are timed one after the other.
        root: rank 0 keeps the times there.
    """

    def __init__(
        self,
        info: ModelInfo,
        settings: Settings,
        memory_limits: Sequence[int],
        ring: Ring,
        machines: Sequence[str],
        root: Path,
    ) -> None:
        self._info, self._settings, self._ring = info, settings, ring
        self._memory_limits = memory_limits
        self._file = times_file(root)
        self._turn = list(machines[: ring.rank]).count(machines[ring.rank])
        self.num_turns = max(Counter(machines).values())
        self._measured = StageTimes()

    def split(self) -> Split:
        """Rank 0: the split to load first.

        Raises:
            PartitionError: it does not fit.
        """
        if self._ring.rank:
            return Split()
        by_hand = self._settings.layer_split
        times = None if by_hand else recall(self._file, self._info.config_hash, self._info.num_layers, self._hosts)
        plans = self._plan(by_hand, times)
        check_fits(plans)
        if self._ring.size > 1:
            how = "by measured times" if times else "as LAYER_SPLIT says" if by_hand else "by the bytes a step reads"
            logger.info("%s", describe(plans, how, is_timed=times is not None))
        return Split(_ranges(plans), is_guess=self._ring.size > 1 and not by_hand and times is None)

    def measure(self, turn: int, stage: StageModel) -> StageTimes:
        """What this rank measured, if its turn has come; no layers where it has not, or where measuring failed."""
        if turn == self._turn:
            try:
                self._measured = measure_stage(stage, _sampled)
            except (ModelError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                logger.warning("could not time the layers (%s): they stay as they are split", error)
        return self._measured

    def split_again(self, loaded: Split, stages: list[StageTimes]) -> Split:
        """Rank 0: the split by what was measured, which is also kept; the loaded one if that is about as good."""
        times = RingTimes(self._info.config_hash, self._hosts, stages)
        if self._ring.rank or not times.is_whole(self._info.num_layers):
            return loaded
        remember(self._file, times)
        now = self._plan([end - start for start, end in loaded.ranges], times)
        best = self._plan((), times)
        is_worth_it = _slowest(now) > _WORTH_LOADING_AGAIN * _slowest(best)
        how = "by measured times" if is_worth_it else "measured times agree with it"
        logger.info("%s", describe(best if is_worth_it else now, how, is_timed=True))
        return Split(_ranges(best)) if is_worth_it else loaded

    @property
    def _hosts(self) -> list[str]:
        return list(self._ring.addresses)

    def _plan(self, layer_split: Sequence[int], times: RingTimes | None) -> tuple[StagePlan, ...]:
        kv_bytes = self._settings.kv_cache_reserved_memory_mb * MIB
        return plan_stages(self._info, self._ring.size, self._memory_limits, kv_bytes, layer_split, times)


def describe(plans: Sequence[StagePlan], how: str, *, is_timed: bool) -> str:
    """For the log: which layers lie where, why, and what that makes of a step."""
    *others, last = (str(plan.layer_range) for plan in plans)
    slowest = f"slowest stage {max(shares(plans)):.0%} of a step"
    if is_timed:
        total = sum(plan.step_cost for plan in plans)
        slowest = f"slowest stage {_slowest(plans) * 1e3:.1f} ms of {total * 1e3:.1f} ms a step"
    return f"layers {', '.join(others)} and {last}: {how}, {slowest}"


def _slowest(plans: Sequence[StagePlan]) -> float:
    return max(plan.step_cost for plan in plans)


def _ranges(plans: Sequence[StagePlan]) -> list[tuple[int, int]]:
    return [(plan.layer_range.start, plan.layer_range.end) for plan in plans]


def _sampled(logits: mx.array) -> mx.array:
    """Draws from logits (rows, 1, vocabulary) as for requests that name no parameters."""
    rows = list(range(logits.shape[0]))
    sampler = Sampler(logits.shape[-1])
    for row in rows:
        sampler.admit(row, SamplingParams(), num_prompt_tokens=1)
    return sampler.sample(logits[:, -1, :], rows, rows)
