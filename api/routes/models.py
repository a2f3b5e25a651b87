"""GET /v1/models and /v1/models/{id}: the one model that is served.

Its name is what is configured, whether the ring is ready or not; how long its context is and what it can do is said
once a ring is ready. /health says whether one is.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.schemas.base import Sent
from api.schemas.models import Capabilities, Model, ModelList
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
    is_ready = service.supervisor.state == "ready"
    ready = service.engine.ready if is_ready else None
    context_length = ready.max_sequence_length if ready else None
    return Model(
        id=service.settings.model_name,
        object="model",
        created=int(service.started_at),
        owned_by="mlx-ring-server",
        context_length=context_length,
        max_model_len=context_length,
        capabilities=_capabilities(service) if is_ready else None,
    )


def _capabilities(service: Service) -> Capabilities | None:
    tokenizer = service.supervisor.tokenizer
    if tokenizer is None:
        return None
    can_chat = tokenizer.template.exists
    return Capabilities(
        chat=can_chat,
        completions=True,
        tools=can_chat,  # whose template has no place for tools is told of them by a text
        structured_output=can_chat,
        reasoning=can_chat and tokenizer.can_think,
        vision=False,
        audio=False,
        embeddings=False,
    )


def _json(message: Sent) -> Response:
    return Response(message.to_json(), media_type="application/json")
