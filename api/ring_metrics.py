"""The ring, its ranks and its caches as Prometheus sees them: read at the moment of a scrape, kept nowhere.

What ranks and scheduler count begins at 0 with every ring and is absent while no ring serves; Prometheus' `rate` and
`increase` take both. Registered by the application, which `/metrics` asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.engine_client import EngineClient
from api.metrics import PREFIX
from api.supervisor import State, Supervisor
from server.protocol import RankInfo, SchedulerCounters

_RANK_GAUGES = {
    "rank_memory_bytes": ("What MLX holds: weights, caches, temporaries.", "memory_bytes"),
    "rank_peak_memory_bytes": ("The most MLX held since the rank's start.", "peak_memory_bytes"),
    "rank_kv_cache_bytes": ("KV cache in use, the prefix cache included.", "kv_cache_bytes"),
    "rank_kv_cache_limit_bytes": ("What the KV cache may grow to.", "kv_cache_bytes_limit"),
    "rank_prefix_cache_bytes": ("Of the KV cache in use, what the prefix cache holds.", "prefix_cache_bytes"),
}
_RANK_COUNTERS = {
    "rank_busy_seconds": ("Time the rank computed.", "busy_s"),
    "rank_idle_seconds": ("Time it waited because the ring had no work.", "idle_s"),
    "rank_bubble_seconds": ("Time it waited while frames were in flight on other ranks.", "bubble_s"),
    "rank_receiving_seconds": ("Time its receiver moved tensors, beside the computing.", "receiving_s"),
    "rank_sending_seconds": ("Time its sender moved tensors, beside the computing.", "sending_s"),
    "rank_frames": ("Frames it ran.", "num_frames"),
    "rank_tokens": ("Tokens of prompts and answers it ran.", "num_tokens"),
}
_SCHEDULER_GAUGES = {
    "num_micro_batch_groups": ("Micro-batch groups in flight.", "num_groups"),
    "kv_cache_tokens": ("Tokens of the KV cache set aside for running requests.", "num_kv_tokens"),
    "prefix_cache_entries": ("Entries of the prefix cache.", "num_prefix_entries"),
    "prefix_cache_tokens": ("Tokens the prefix cache holds.", "num_prefix_tokens"),
}
_SCHEDULER_COUNTERS = {
    "prompt_tokens": ("Prompt tokens of requests the ring began with.", "num_prompt_tokens"),
    "prompt_tokens_cached": ("Of them, those the prefix cache held.", "num_cached_tokens"),
    "generation_tokens": ("Tokens generated.", "num_generated_tokens"),
    "num_preemptions": ("Running requests that stepped back for want of memory.", "num_preemptions"),
}


class RingCollector(Collector):
    def __init__(self, engine: EngineClient, supervisor: Supervisor) -> None:
        self._engine = engine
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        """All families, each with the samples there are now."""
        yield from self._server()
        if self._engine.stats is not None:
            yield from _scheduler(self._engine.stats.counters)
        yield from _ranks(self._supervisor.ranks)

    def _server(self) -> Iterable[Metric]:
        engine, supervisor = self._engine, self._supervisor
        state = GaugeMetricFamily(f"{PREFIX}_state", "1 for the state the server is in.", labels=["state"])
        for name in get_args(State):
            state.add_metric([name], name == supervisor.state)
        yield state
        yield CounterMetricFamily(f"{PREFIX}_restarts", "Rings that were lost while they served.", supervisor.num_lost)
        yield GaugeMetricFamily(f"{PREFIX}_num_requests_running", "Requests the ring works on.", engine.num_running)
        yield GaugeMetricFamily(f"{PREFIX}_num_requests_waiting", "Requests that wait.", engine.num_waiting)
        if engine.serving_since is not None and engine.ready is not None:
            capacity = engine.ready.kv_cache_tokens
            yield GaugeMetricFamily(f"{PREFIX}_kv_cache_capacity_tokens", "Tokens the KV cache can hold.", capacity)


def _scheduler(counters: SchedulerCounters) -> Iterable[Metric]:
    for name, (documentation, field) in _SCHEDULER_GAUGES.items():
        yield GaugeMetricFamily(f"{PREFIX}_{name}", documentation, getattr(counters, field))
    for name, (documentation, field) in _SCHEDULER_COUNTERS.items():
        yield CounterMetricFamily(f"{PREFIX}_{name}", documentation, getattr(counters, field))


def _ranks(ranks: Sequence[RankInfo]) -> Iterable[Metric]:
    labels = ["rank", "host"]
    for name, (documentation, field) in _RANK_GAUGES.items():
        gauge = GaugeMetricFamily(f"{PREFIX}_{name}", documentation, labels=labels)
        for info in ranks:
            gauge.add_metric([str(info.rank), info.host], getattr(info, field))
        yield gauge
    for name, (documentation, field) in _RANK_COUNTERS.items():
        counter = CounterMetricFamily(f"{PREFIX}_{name}", documentation, labels=labels)
        for info in ranks:
            counter.add_metric([str(info.rank), info.host], getattr(info.counters, field))
        yield counter
