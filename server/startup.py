"""From a joined ring to a rank that serves: settings, model, split, weights, budget, in laps round the ring.

Rank 0 gets the settings from the api process and passes them on; only rank 0 decides the split. `server.__main__` calls
`start_rank` once.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import threading
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import msgspec
from mlx_lm.utils import maybe_set_recommended_wired_limit

from config import Settings
from distributed.builtin_model import resolve_form
from distributed.handshake import Introduction, meet
from distributed.layer_times import StageTimes
from distributed.memory import is_allocation_failure, rank_memory_limit_bytes
from distributed.model_files import ModelInfo, ensure_weights, inspect_model, prepare_model
from distributed.partition import LayerRange
from distributed.pipeline import Pipeline
from distributed.ring import Ring
from distributed.shard.load import load_stage
from server.api_link import ApiLink
from server.chunking import MAX_CHUNK_TOKENS
from server.counters import StageClock
from server.engine import Engine, RequestLimits
from server.errors import ServerError
from server.grammar import Grammars
from server.kv_budget import MIB, KVBudget, RankCost
from server.laps import Laps, StartError
from server.placing import Placing, Split
from server.protocol import Failed, Progress, RankInfo, Ready
from server.scheduler import Scheduler, SchedulerOptions
from server.stage import Stage
from server.status import READY, RankStatus, decode_reports
from server.warm_up import NUM_TOKENS, warm_up
from server.worker import run_worker

DEFAULT_MAX_RUNNING = 32
# Grammars need the vocabulary in a form of their own, and making it holds up all of a rank's threads for half a second:
# not while the ring starts, and better not during the first request that has a grammar.
_GRAMMARS_AFTER_S = 2.0

logger = logging.getLogger(__name__)


class ModelFacts(msgspec.Struct, frozen=True):
    """What must agree before the layers are split, and each rank's room."""

    config_hash: str
    memory_limit_bytes: int


def start_rank(ring: Ring, api: ApiLink | None, configured: dict[str, Any]) -> NoReturn:
    """Bring this rank up and serve until the process ends.

    Args:
        ring: joined; nothing else has been exchanged yet.
        api: rank 0's connection to the api process, None on other ranks.
        configured: rank 0's settings as the api sent them; empty elsewhere.
    """
    status = RankStatus(ring.rank)
    pipeline, everyone = meet(ring, queue.SimpleQueue(), status.report)
    if api is not None:
        api.start_reading(pipeline)
    rank = _RankStart(ring, pipeline, everyone, api, status)
    try:
        rank.start(configured)
    except StartError as error:
        logger.error("%s", error)
        if api is None:
            threading.Event().wait()  # rank 0's goodbye, or the end of a neighbour, ends this process
        api.send(Failed(str(error), error.permanent, error.out_of_memory))  # type: ignore[union-attr]
        pipeline.close(timeout_s=5.0)
        raise SystemExit(1) from error
    except (MemoryError, RuntimeError) as error:
        if is_allocation_failure(error):
            raise status.out_of_memory(error) from error
        raise
    raise AssertionError("unreachable: a started rank serves until its process ends")


class _RankStart:
    """The laps, in order."""

    def __init__(
        self, ring: Ring, pipeline: Pipeline, everyone: list[Introduction], api: ApiLink | None, status: RankStatus
    ) -> None:
        self._ring = ring
        self._pipeline = pipeline
        self._machines = [introduction.host for introduction in everyone]
        self._api = api
        self._root = Path.cwd()  # where mlx.launch put us: the project's folder, WORKER_DIR on other machines
        self._status = status
        self._laps = Laps(pipeline, everyone, status)
        self._grammars: Grammars | None = None  # on the last rank
        if api is not None:
            pipeline.on_reports = self._send_progress

    def start(self, configured: dict[str, Any]) -> NoReturn:
        shared = self._laps.run("agree on the settings", lambda: self._for_all_ranks(configured), dict[str, Any])
        settings = Settings.from_ranks(shared[0])
        logging.getLogger().setLevel(settings.log_level)
        local_ranks = int(os.environ.get("MLX_RING_LOCAL_RANKS", "1"))

        facts = self._laps.run("find the model", lambda: self._prepare(settings, local_ranks), ModelFacts)
        self._check_same_model(facts)
        costs = self._place(settings, [fact.memory_limit_bytes for fact in facts])
        budget, max_length = self._budget(settings, costs)
        self._status.kv_cache_bytes = lambda: self._stage.caches.num_bytes
        self._status.prefix_cache_bytes = lambda: self._stage.caches.prefix_bytes
        self._status.kv_cache_bytes_limit = budget.bytes_limit(self._ring.rank)
        ranks = self._laps.run("tell what each rank holds", self._status.info, RankInfo)
        self._status.state = READY
        clock = StageClock(self._pipeline)
        self._status.counters = clock.counters
        if self._grammars is not None:
            self._grammars.warm(_GRAMMARS_AFTER_S)
        if self._api is None:
            self._pipeline.serves()
            run_worker(self._stage, self._pipeline, clock)
        self._laps.tell("run a first token through the ring")
        num_tokens = min(_max_chunk_tokens(settings), max_length - 1) if mx.metal.is_available() else NUM_TOKENS
        warm_up(self._stage, self._pipeline, self._info.vocab_size, num_tokens)
        options = SchedulerOptions(
            max_sequence_length=max_length,
            max_running=settings.max_concurrent_requests or DEFAULT_MAX_RUNNING,
            num_stages=self._ring.size,
            chunk_tokens=settings.prefill_chunk_tokens,
            num_groups=settings.micro_batch_groups,
            prefix_cache=settings.prefix_cache,
        )
        self._serve(Scheduler(budget, options), clock, budget, options, ranks)

    def _serve(
        self,
        scheduler: Scheduler,
        clock: StageClock,
        budget: KVBudget,
        options: SchedulerOptions,
        ranks: list[RankInfo],
    ) -> NoReturn:
        assert self._api is not None
        limits = RequestLimits(self._info.vocab_size, options.max_sequence_length)
        engine = Engine(self._stage, self._pipeline, scheduler, self._api, clock, limits, ranks)
        self._status.state = READY
        ready = Ready(
            model_path=str(self._info.path),
            max_sequence_length=options.max_sequence_length,
            kv_cache_tokens=budget.capacity_tokens,
            vocab_size=self._info.vocab_size,
            max_concurrent_requests=options.max_running,
            ranks=ranks,
        )
        self._pipeline.serves()
        self._api.send(ready)
        self._pipeline.on_reports = engine.send_stats
        engine.run()

    # -- the laps' work ----------------------------------------------------------------------------------------------

    def _for_all_ranks(self, configured: dict[str, Any]) -> dict[str, Any]:
        """The embedded model has two forms, of which a Mac and a Linux machine would choose different ones."""
        return configured and configured | {"model_repo": resolve_form(configured["model_repo"])}

    def _prepare(self, settings: Settings, local_ranks: int) -> ModelFacts:
        self._info: ModelInfo = inspect_model(prepare_model(settings.model_repo, self._root, progress=self._laps.tell))
        limit = rank_memory_limit_bytes(self._ring.rank, local_ranks, settings.rank_memory_limit_mb)
        return ModelFacts(self._info.config_hash, limit)

    def _place(self, settings: Settings, memory_limits: list[int]) -> list[RankCost]:
        """Split and load the layers; where nobody knows yet how long they take, time them and perhaps split again."""
        placing = Placing(self._info, settings, memory_limits, self._ring, self._machines, self._root)
        split = self._laps.run("split the layers", placing.split, Split)[0]
        costs = self._load_share(settings, split)
        if not split.is_guess:
            return costs
        times: list[StageTimes] = []
        for turn in range(placing.num_turns):
            times = self._laps.run("time the layers", partial(placing.measure, turn, self._model), StageTimes)
        better = self._laps.run("split the layers by their times", partial(placing.split_again, split, times), Split)[0]
        if better == split:
            return costs
        del self._stage, self._model  # or memory would hold both
        gc.collect()
        mx.clear_cache()
        return self._load_share(settings, better)

    def _load_share(self, settings: Settings, split: Split) -> list[RankCost]:
        layer_range = LayerRange(*split.ranges[self._ring.rank])
        self._status.layers = (layer_range.start, layer_range.end)
        return self._laps.run(f"load layers {layer_range}", lambda: self._load(settings, layer_range), RankCost)

    def _load(self, settings: Settings, layer_range: LayerRange) -> RankCost:
        is_first, is_last = self._ring.rank == 0, self._ring.is_last
        ensure_weights(self._info, layer_range, is_first, is_last, self._laps.tell)
        if mx.metal.is_available():  # from MLX's documentation: weights stay resident up to this limit
            maybe_set_recommended_wired_limit()
        self._model = load_stage(self._info, layer_range, trust_remote_code=settings.trust_remote_code)
        self._stage = Stage(self._model, settings.kv_cache_bits, self._make_grammars)
        logger.info("holds layers %s: %.0f MiB", layer_range, mx.get_active_memory() / MIB)
        return self._stage.cache_cost

    def _make_grammars(self, vocab_size: int) -> Grammars:
        self._grammars = Grammars(self._info.path, vocab_size)
        return self._grammars

    def _budget(self, settings: Settings, costs: list[RankCost]) -> tuple[KVBudget, int]:
        budget = KVBudget(
            costs,
            settings.kv_cache_reserved_memory_mb * MIB,
            settings.kv_cache_max_size,
            chunk_tokens=_max_chunk_tokens(settings),
        )
        try:
            max_length = budget.max_sequence_length(settings.max_sequence_length, self._info.max_context)
        except ServerError as error:
            raise StartError(str(error), permanent=True) from error
        logger.info(
            "KV cache: %d tokens in all, %d a request; at most %.0f MiB on this rank",
            budget.capacity_tokens,
            max_length,
            budget.bytes_limit(self._ring.rank) / MIB,
        )
        return budget, max_length

    def _check_same_model(self, facts: list[ModelFacts]) -> None:
        for rank, fact in enumerate(facts):
            if fact.config_hash != facts[0].config_hash:
                raise StartError(
                    f"{self._laps.name(rank)} has another version of the model than {self._laps.name(0)}: their "
                    f"config.json differ ({fact.config_hash[:12]} and {facts[0].config_hash[:12]}); bring the same "
                    "files to both (./launch.sh workers)",
                    permanent=True,
                )

    def _send_progress(self, reports: list[bytes]) -> None:
        """From the heartbeat, once a second: what each rank is at."""
        assert self._api is not None
        states = [(f"rank {info.rank}", info.state) for info in decode_reports(reports)]
        together = {state for _, state in states}
        if len(together) == 1:
            detail = f"all {self._ring.size} ranks: {together.pop()}" if len(states) > 1 else together.pop()
        else:
            detail = "; ".join(f"{name}: {state}" for name, state in states)
        self._api.send(Progress(detail))


def _max_chunk_tokens(settings: Settings) -> int:
    return settings.prefill_chunk_tokens or MAX_CHUNK_TOKENS
