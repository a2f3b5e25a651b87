"""GET /health: 200 when requests are served, 503 when not, and what the ring is doing.

Open to all for its state; where there are API keys, the details (paths, hosts, last words of a rank) are only for those
who show one. Read by launch.sh, by load balancers and by people.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.engine_client import RETRY_AFTER_S
from api.ring_machines import Absence
from api.service import service_of
from server.protocol import RankInfo, SchedulerCounters

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    service = service_of(request)
    supervisor, engine = service.supervisor, service.engine
    is_ready = supervisor.state == "ready"
    ready = engine.ready if is_ready else None
    report = {
        "status": supervisor.state,
        "model": service.settings.model_name,
        "uptime_s": round(service.uptime_s, 3),
    }
    if not service.settings.api_keys or hasattr(request.state, "api_key_label"):
        report |= {
            "detail": supervisor.detail,
            "waiting_for": [_absence(absence) for absence in supervisor.machines.missed],
            "max_sequence_length": ready.max_sequence_length if ready else None,
            "kv_cache_tokens": ready.kv_cache_tokens if ready else None,
            "requests": {"running": engine.num_running, "waiting": engine.num_waiting},
            "prefix_cache": _prefix_cache(engine.stats.counters) if engine.stats else None,
            "ranks": [_rank(info) for info in supervisor.ranks],
        }
    headers = {} if is_ready else {"Retry-After": str(RETRY_AFTER_S)}
    return JSONResponse(report, 200 if is_ready else 503, headers)


def _absence(absence: Absence) -> dict[str, str]:
    since = datetime.fromtimestamp(absence.since, UTC)
    return {"host": absence.host, "since": since.isoformat(timespec="seconds"), "reason": absence.reason}


def _prefix_cache(counters: SchedulerCounters) -> dict[str, int]:
    """What it holds now, and how many of the prompts' tokens it had; since the ring's start."""
    return {
        "entries": counters.num_prefix_entries,
        "tokens": counters.num_prefix_tokens,
        "prompt_tokens": counters.num_prompt_tokens,
        "cached_tokens": counters.num_cached_tokens,
    }


def _rank(info: RankInfo) -> dict[str, Any]:
    return msgspec.to_builtins(info) | {"counters": msgspec.structs.asdict(info.counters)}
