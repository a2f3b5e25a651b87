"""GET /metrics for Prometheus: as text, or as OpenMetrics where the scraper asks for it.

Asks for a key where there are API_KEYS, as every path but /health does: what it says of load is nobody else's business.
"""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from api.service import service_of

router = APIRouter()


@router.api_route("/metrics", methods=["GET", "HEAD"])
async def metrics(request: Request) -> Response:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service_of(request).engine.metrics.registry), headers={"Content-Type": content_type})
