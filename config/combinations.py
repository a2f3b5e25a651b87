"""Which values exclude each other, each fine by itself, and which go together though few would want that.

Plain rules over finished settings. `config.load` asks on the api's side, before anything starts; the ranks take what
was checked there (they lack the api's own keys, so they could not check). What depends on the model the ring checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import NamedTuple

from config.settings import Settings


class Conflict(NamedTuple):
    """Fields whose values exclude each other, and what to change."""

    fields: tuple[str, ...]
    mend: str


def conflicts(settings: Settings) -> Iterator[Conflict]:
    """Every combination that no ring could run. Raises ConfigError where HOSTFILE has to be read and cannot be."""
    if settings.worker_hosts and settings.hostfile:
        yield Conflict(("worker_hosts", "hostfile"), "set one of the two: a hostfile lists every machine already")
        return
    yield from _per_rank(settings)
    yield from _lengths(settings)
    yield from _ports(settings)
    if settings.poll_interval >= settings.step_timeout:
        mend = "the supervisor must look more often than a step may last: lower POLL_INTERVAL"
        yield Conflict(("poll_interval", "step_timeout"), mend)


def warnings(settings: Settings) -> Iterator[str]:
    """What works and is rarely meant, for the terminal and the log."""
    if not settings.api_keys and not _is_loopback(settings.api_host):
        yield (
            f"API_HOST={settings.api_host} lets other machines in and API_KEYS is empty: everyone who reaches this "
            "machine may use the server; set API_KEYS"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _ranks_field(settings: Settings) -> str:
    """The field that says how many ranks there are."""
    return "hostfile" if settings.hostfile else "worker_hosts" if settings.worker_hosts else "ring_size"


def _per_rank(settings: Settings) -> Iterator[Conflict]:
    num_ranks, counted_by = settings.world_size_hint, _ranks_field(settings)
    if settings.layer_split and len(settings.layer_split) != num_ranks:
        mend = f"LAYER_SPLIT must be auto or have one entry for each rank, {num_ranks} in all"
        yield Conflict(("layer_split", counted_by), mend)
    if len(settings.rank_memory_limit_mb) not in (0, 1, num_ranks):
        mend = f"RANK_MEMORY_LIMIT_MB must be one value for all or have one for each rank, {num_ranks} in all"
        yield Conflict(("rank_memory_limit_mb", counted_by), mend)


def _lengths(settings: Settings) -> Iterator[Conflict]:
    """One request fits the cache, and an answer and a prompt fit one request."""
    longest, cache, answer = settings.max_sequence_length, settings.kv_cache_max_size, settings.default_max_tokens
    if longest and cache and longest > cache:
        mend = "one request cannot be longer than the whole cache: raise KV_CACHE_MAX_SIZE or lower MAX_SEQUENCE_LENGTH"
        yield Conflict(("max_sequence_length", "kv_cache_max_size"), mend)
    for field, limit in (("max_sequence_length", longest), ("kv_cache_max_size", cache)):
        if answer and limit and answer >= limit:
            mend = f"an answer must leave room for the prompt: lower DEFAULT_MAX_TOKENS or raise {field.upper()}"
            yield Conflict(("default_max_tokens", field), mend)


def _ports(settings: Settings) -> Iterator[Conflict]:
    """mlx.launch numbers the ranks' ports from RING_PORT on."""
    last = settings.ring_port + settings.world_size_hint - 1
    if last > 65535:
        yield Conflict(("ring_port", _ranks_field(settings)), f"the ring's last port would be {last}: lower RING_PORT")
    last_here = last if _ranks_field(settings) == "ring_size" else settings.ring_port
    if settings.ring_port <= settings.api_port <= last_here:
        mend = f"the ring uses ports {settings.ring_port} to {last_here} of this machine: move one of the two"
        yield Conflict(("api_port", "ring_port"), mend)
