"""Every error a client can be answered with, and the one table that says how.

    ApiError
    ├── InvalidRequest            400  the request is wrong; names the field
    │   ├── UnknownParameter      400  a field that no reference documents
    │   ├── UnsupportedParameter  400  a documented field that this server does not do
    │   └── ContextLengthExceeded 400  prompt and completion are longer than one request may be
    ├── Unauthorized              401
    ├── NotFound                  404
    │   ├── ModelNotFound         404
    │   └── ResponseNotFound      404  not stored, or another key's
    ├── MethodNotAllowed          405
    ├── BodyTimeout               408  the body stopped coming
    ├── BodyTooLarge              413
    ├── UnsupportedMediaType      415
    ├── QueueFull                 429
    ├── EngineFailure             500  the ring could not serve this request
    ├── StoreFailure              500  the store of responses cannot be read
    ├── NotReady                  503  the ring is starting, has failed, or is being stopped
    └── Stalled                   504  no progress within REQUEST_TIMEOUT

An error carries what its answer needs and nothing else; routes raise them, `error_response` makes OpenAI's error object
of them, `error_response_for` Anthropic's on the paths that are Anthropic's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from starlette.responses import JSONResponse
from starlette.types import Scope


class ApiError(Exception):
    """Base of what a client is told. `message` is for people, `param` names the field, `code` is for programs."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


class InvalidRequest(ApiError):
    """The request is wrong; `param` names the field."""


class UnknownParameter(InvalidRequest):
    """A field that no reference documents."""


class UnsupportedParameter(InvalidRequest):
    """A documented field that this server does not do, or not yet."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and completion are longer than one request may be."""


class Unauthorized(ApiError):
    """No API key, or a wrong one."""


class NotFound(ApiError):
    """No such path."""


class ModelNotFound(NotFound):
    """A model that this server does not serve."""


class ResponseNotFound(NotFound):
    """A response that is not stored, or belongs to another key."""


class MethodNotAllowed(ApiError):
    """The path is there, this method is not."""


class BodyTimeout(ApiError):
    """The request's body stopped coming."""


class BodyTooLarge(ApiError):
    """The request's body is over MAX_BODY_BYTES."""


class UnsupportedMediaType(ApiError):
    """The body is declared to be something other than JSON."""


class QueueFull(ApiError):
    """As many requests wait as may (MAX_QUEUED_REQUESTS, or of this key MAX_QUEUED_REQUESTS_PER_KEY)."""


class EngineFailure(ApiError):
    """The ring could not serve this request."""


class StoreFailure(ApiError):
    """The store of responses cannot be read or changed."""


class NotReady(ApiError):
    """The ring is starting, has failed, or is being stopped."""


class Stalled(ApiError):
    """Nothing happened to the request within REQUEST_TIMEOUT."""


class Answer(NamedTuple):
    """How a kind of error is answered; `code` where the error itself gives none."""

    status: int
    type: str
    code: str | None = None


_INVALID = "invalid_request_error"

ANSWERS: dict[type[ApiError], Answer] = {
    InvalidRequest: Answer(400, _INVALID),
    UnknownParameter: Answer(400, _INVALID, "unknown_parameter"),
    UnsupportedParameter: Answer(400, _INVALID, "unsupported_parameter"),
    ContextLengthExceeded: Answer(400, _INVALID, "context_length_exceeded"),
    Unauthorized: Answer(401, _INVALID, "invalid_api_key"),
    NotFound: Answer(404, _INVALID, "unknown_url"),
    ModelNotFound: Answer(404, _INVALID, "model_not_found"),
    ResponseNotFound: Answer(404, _INVALID, "response_not_found"),
    MethodNotAllowed: Answer(405, _INVALID, "method_not_supported"),
    BodyTimeout: Answer(408, _INVALID, "request_timeout"),
    BodyTooLarge: Answer(413, _INVALID, "request_too_large"),
    UnsupportedMediaType: Answer(415, _INVALID, "unsupported_media_type"),
    QueueFull: Answer(429, "rate_limit_error", "rate_limit_exceeded"),
    EngineFailure: Answer(500, "server_error", "internal_error"),
    StoreFailure: Answer(500, "server_error", "store_failure"),
    NotReady: Answer(503, "server_error", "server_not_ready"),
    Stalled: Answer(504, "server_error", "timeout"),
}


ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def http_status(error: ApiError) -> int:
    """The status of this error's answer."""
    return ANSWERS[type(error)].status


def error_object(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object, as the body of an answer or the data of a stream's event."""
    answer = ANSWERS[type(error)]
    code = error.code or answer.code
    return {"error": {"message": error.message, "type": answer.type, "param": error.param, "code": code}}


def anthropic_error_object(error: ApiError, request_id: str) -> dict[str, Any]:
    """Anthropic's error object, which has no place for the field but in the message."""
    named = error.param is None or f"'{error.param}'" in error.message
    message = error.message if named else f"{error.param}: {error.message}"
    type_ = ANTHROPIC_TYPES.get(http_status(error), _INVALID)
    return {"type": "error", "error": {"type": type_, "message": message}, "request_id": request_id}


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The whole HTTP answer."""
    return JSONResponse(error_object(error), http_status(error), _headers(error, headers))


def error_response_for(scope: Scope, error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The whole HTTP answer in the form that the clients of this path read."""
    path: str = scope["path"]
    if path != ANTHROPIC_PATH and not path.startswith(f"{ANTHROPIC_PATH}/"):
        return error_response(error, headers)
    request_id: str = scope["state"]["request_id"]
    content = anthropic_error_object(error, request_id)
    return JSONResponse(content, http_status(error), {**_headers(error, headers), "request-id": request_id})


def _headers(error: ApiError, headers: dict[str, str] | None) -> dict[str, str]:
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers
