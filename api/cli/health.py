"""What the running server says of itself: GET /health, and the lines in which the commands show it.

Only reads. Called by start, which waits on it, and by status.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from config import Settings
from distributed.errors import HostError
from distributed.hosts import own_address_towards

Health = dict[str, Any]

_ELSEWHERE = "192.0.2.1"  # of a network for documentation (RFC 5737): the way there is the one to other machines
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def base_url(settings: Settings) -> str:
    """Where a client on this machine reaches the server."""
    host = _ANYWHERE.get(settings.api_host, settings.api_host)
    return f"http://[{host}]:{settings.api_port}" if ":" in host else f"http://{host}:{settings.api_port}"


def url_for_others(settings: Settings) -> list[str]:
    """Where other machines reach a server that listens on all addresses, as far as this machine has one for them."""
    if settings.api_host not in _ANYWHERE:
        return []
    try:
        address = own_address_towards(_ELSEWHERE)
    except HostError:
        return []
    return [base_url(settings.model_copy(update={"api_host": address}))]


def fetch_health(settings: Settings, timeout_s: float = 5.0) -> Health | None:
    """The body of /health, whatever its status code; None where nothing of ours answers."""
    # A proxy of the environment must not get in between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{base_url(settings)}/health")
    if settings.api_keys:  # without one it says no details
        key = settings.api_keys[0].key.get_secret_value()
        request.add_header("Authorization", f"Bearer {key}".encode().decode("latin-1"))
    try:
        with _answer(opener, request, timeout_s) as answer:
            health = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError):  # another program's port, or an api that just ends
        return None
    return health if isinstance(health, dict) and "status" in health else None


def _answer(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout_s: float) -> Any:
    """Open, with whatever status code."""
    try:
        return opener.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        return error


def not_applied(changed: Sequence[str]) -> str:
    """`changed`: keys, as `reload.differences` names them."""
    return f"what is set now differs from what runs in {', '.join(changed)}: ./launch.sh restart applies it"


def absence_line(absence: dict[str, str]) -> str:
    """Which machine the server waits for, and how long it has."""
    since = datetime.fromisoformat(absence["since"])
    passed = timedelta(seconds=round((datetime.now(UTC) - since).total_seconds()))
    return f"waits     for {absence['host']} since {since.astimezone():%Y-%m-%d %H:%M:%S} ({passed})"


def rank_lines(ranks: list[dict[str, Any]]) -> list[str]:
    """A table of what each rank holds."""
    if not ranks:
        return []
    rows: list[tuple[str, ...]] = [("rank", "host", "pid", "layers", "memory", "KV cache", "of at most", "busy")]
    for rank in ranks:
        start, end = rank["layers"]
        sizes = (format_bytes(rank[key]) for key in ("memory_bytes", "kv_cache_bytes", "kv_cache_bytes_limit"))
        rows.append((str(rank["rank"]), rank["host"], str(rank["pid"]), f"[{start}, {end})", *sizes, _busy(rank)))
    return table(rows)


def _busy(rank: dict[str, Any]) -> str:
    """How much of the time in which the ring had work this rank computed, since it got ready."""
    counters = rank.get("counters") or {}
    busy_s, bubble_s = counters.get("busy_s", 0.0), counters.get("bubble_s", 0.0)
    return f"{busy_s / (busy_s + bubble_s):.0%}" if busy_s else "-"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def format_bytes(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
