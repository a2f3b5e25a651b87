"""GET /v1/models and /v1/models/{id}: the one model that is served.

It says what is configured, whether the ring is ready or not; /health says whether it is.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.schemas import Model, ModelList, Sent
from api.service import Service, service_of

router = APIRouter()


@router.api_route("/v1/models", methods=["GET", "HEAD"])
async def list_models(request: Request) -> Response:
    return _json(ModelList(object="list", data=[_model(service_of(request))]))


@router.api_route("/v1/models/{model:path}", methods=["GET", "HEAD"])
async def retrieve_model(request: Request, model: str) -> Response:
    """`model` may hold slashes, sent as they are or as %2F."""
    service = service_of(request)
    service.check_model(model)
    return _json(_model(service))


def _model(service: Service) -> Model:
    name = service.settings.model_name
    return Model(id=name, object="model", created=int(service.started_at), owned_by="mlx-ring-server")


def _json(message: Sent) -> Response:
    return Response(message.to_json(), media_type="application/json")
