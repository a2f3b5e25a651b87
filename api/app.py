"""The HTTP application: routes, middleware, and every error in OpenAI's form.

Whatever goes wrong leaves through `api.errors`, FastAPI's own answers (404, 405, 422) included. It starts nothing: the
supervisor and the engine client come ready made from the entry point, or from a test.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from api.engine_client import EngineClient
from api.errors import ApiError, InvalidRequest, MethodNotAllowed, NotFound, error_response_for, http_status
from api.middleware import ApiKeyCheck, ErrorBoundary, RequestId
from api.responses.store import ResponseStore
from api.ring_metrics import RingCollector
from api.routes import chat, completions, docs, health, messages, metrics, models, responses, tokens, unsupported
from api.service import Service
from api.supervisor import Supervisor
from config import Settings
from config.logging import printable
from distributed.launch import run_dir

logger = logging.getLogger(__name__)

EXPOSED_HEADERS = ["x-request-id", "request-id", "x-ignored-fields", "retry-after"]


def create_app(settings: Settings, engine: EngineClient, supervisor: Supervisor) -> FastAPI:
    """The application that uvicorn serves."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)  # its own description knows no request's body
    app.state.service = Service(settings, engine, supervisor)
    app.state.response_store = ResponseStore(
        run_dir(settings.project_root), settings.responses_store_max, settings.responses_store_max_bytes
    )
    engine.metrics.registry.register(RingCollector(engine, supervisor))
    for routes in (chat, completions, messages, responses, models, tokens, health, metrics, docs, unsupported):
        app.include_router(routes.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)
    # Starlette puts the middleware added last outermost.
    app.add_middleware(ErrorBoundary)
    app.add_middleware(ApiKeyCheck, keys=settings.api_keys)
    if settings.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(RequestId)
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    status = http_status(error)
    level = logging.WARNING if status >= 500 else logging.INFO
    path, message = printable(request.url.path), printable(error.message)
    logger.log(level, "%s %s: %d %s", request.method, path, status, message)
    return error_response_for(request.scope, error)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or not this method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allow = dict(error.headers or {})
        if method == "OPTIONS":  # not a preflight, those end in the CORS middleware
            return Response(status_code=204, headers=allow)
        return error_response_for(request.scope, MethodNotAllowed(f"Not allowed to {method} on {path}."), allow)
    message = (
        f"Invalid URL ({method} {path}). The base URL of OpenAI's clients is http://HOST:PORT/v1, that of Anthropic's "
        "http://HOST:PORT; GET /docs shows every path."
    )
    return error_response_for(request.scope, NotFound(message))


async def _validation_error(request: Request, error: Exception) -> Response:
    return error_response_for(request.scope, InvalidRequest(f"Invalid request: {error}"))
