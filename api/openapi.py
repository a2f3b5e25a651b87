"""The OpenAPI description of this server, made from the schemas that requests are checked with.

Routes read their bodies themselves, so FastAPI cannot know what they take; `OPERATIONS` says it, and a test holds the
table and the routes together. It describes and decides nothing. Served by api/routes/docs.py; the fuzzer reads it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from api.errors import (
    ANSWERS,
    ANTHROPIC_PATH,
    ApiError,
    BodyTimeout,
    BodyTooLarge,
    EngineFailure,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    QueueFull,
    ResponseNotFound,
    Stalled,
    StoreFailure,
    Unauthorized,
    UnsupportedMediaType,
)
from api.schemas import anthropic_answer, response_answer
from api.schemas.anthropic import CountTokensRequest, MessagesRequest
from api.schemas.chat import ChatCompletionRequest
from api.schemas.chat_answer import ChatCompletion, ChatCompletionChunk
from api.schemas.completions import Completion, CompletionRequest
from api.schemas.errors import AnthropicErrorResponse, ErrorResponse
from api.schemas.models import Model, ModelList
from api.schemas.responses import InputItemsQuery, InputTokensRequest, ResponseRequest, RetrieveQuery
from api.schemas.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from distributed.version import VERSION

ABOUT = (
    "OpenAI's API in front of one language model that is cut over the machines of a ring. Every documented field is "
    "done, or refused with a 400 that names it; docs/api.md says which, and how."
)

_OF_A_BODY = (InvalidRequest, ModelNotFound, BodyTimeout, BodyTooLarge, UnsupportedMediaType)
_OF_AN_ANSWER = (*_OF_A_BODY, QueueFull, EngineFailure, NotReady, Stalled)
_OF_STORED = (InvalidRequest, ResponseNotFound, StoreFailure)

_HELLO = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Operation:
    """One method of one path. `request`, `answer`, `events` (of a stream) and `query` are types that pydantic knows."""

    method: Literal["get", "post", "delete"]
    path: str
    name: str  # of the function that does it
    summary: str
    request: Any = None
    answer: Any = None
    events: Any = None
    errors: tuple[type[ApiError], ...] = ()
    media_type: str = "application/json"
    statuses: tuple[int, ...] = (200,)  # of the answer
    needs_key: bool = True
    query: Any = None
    example: dict[str, Any] = field(default_factory=dict)  # a request's body, beside the model

    @property
    def is_anthropic(self) -> bool:
        """Whether its errors are in Anthropic's form."""
        return self.path.startswith(ANTHROPIC_PATH)


OPERATIONS = (
    Operation(
        "post", "/v1/chat/completions", "create_chat_completion", "The answer to a chat, whole or as a stream",
        ChatCompletionRequest, ChatCompletion, ChatCompletionChunk, _OF_AN_ANSWER, example={"messages": _HELLO},
    ),
    Operation(
        "post", "/v1/completions", "create_completion", "The texts that follow raw prompts, whole or as a stream",
        CompletionRequest, Completion, Completion, _OF_AN_ANSWER, example={"prompt": "Once upon a time"},
    ),
    Operation(
        "post", "/v1/responses", "create_response", "The response to an input, whole or as a stream",
        ResponseRequest, response_answer.Response, response_answer.StreamEvent, (*_OF_AN_ANSWER, StoreFailure),
        example={"input": "Hello"},
    ),
    Operation(
        "post", "/v1/responses/input_tokens", "count_input_tokens", "How many tokens an input is",
        InputTokensRequest, response_answer.InputTokens, errors=(*_OF_A_BODY, StoreFailure, NotReady),
        example={"input": "Hello"},
    ),
    Operation(
        "get", "/v1/responses/{response_id}", "retrieve_response", "A stored response", query=RetrieveQuery,
        answer=response_answer.Response, errors=_OF_STORED,
    ),
    Operation(
        "delete", "/v1/responses/{response_id}", "delete_response", "Forget a stored response",
        answer=response_answer.DeletedResponse, errors=(ResponseNotFound, StoreFailure),
    ),
    Operation(
        "get", "/v1/responses/{response_id}/input_items", "list_input_items", "What a stored response was made from",
        query=InputItemsQuery, answer=response_answer.ItemList, errors=_OF_STORED,
    ),
    Operation(
        "post", "/v1/responses/{response_id}/cancel", "cancel_response", "Refused: nothing runs in the background",
        statuses=(), errors=_OF_STORED,
    ),
    Operation(
        "post", "/v1/messages", "create_message", "Anthropic's API: the message that follows, whole or as a stream",
        MessagesRequest, anthropic_answer.Message, anthropic_answer.StreamEvent, _OF_AN_ANSWER,
        example={"max_tokens": 100, "messages": _HELLO},
    ),
    Operation(
        "post", "/v1/messages/count_tokens", "count_tokens", "Anthropic's API: how many tokens a request is",
        CountTokensRequest, anthropic_answer.TokenCount, errors=(*_OF_A_BODY, NotReady), example={"messages": _HELLO},
    ),
    Operation("get", "/v1/models", "list_models", "The one model that is served", answer=ModelList),
    Operation(
        "get", "/v1/models/{model}", "retrieve_model", "The same by its name", answer=Model, errors=(ModelNotFound,)
    ),
    Operation(
        "post", "/tokenize", "tokenize", "A text or a chat as token ids",
        TokenizeRequest, TokenizeResponse, errors=(*_OF_A_BODY, NotReady), example={"prompt": "Hello"},
    ),
    Operation(
        "post", "/detokenize", "detokenize", "Token ids as text",
        DetokenizeRequest, DetokenizeResponse, errors=(*_OF_A_BODY, NotReady), example={"tokens": [1, 2]},
    ),
    Operation(
        "get", "/health", "health", "Whether requests are served, and what the ring is doing", answer=dict[str, Any],
        statuses=(200, 503), needs_key=False,
    ),
    Operation("get", "/metrics", "metrics", "For Prometheus", answer=str, media_type="text/plain"),
)  # fmt: skip


class _Schemas(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        """A title that repeats the field's name says nothing."""
        return False


@cache
def document(model: str, has_keys: bool) -> dict[str, Any]:
    """The whole description. `model`: the name of the served one; `has_keys`: whether this server has API_KEYS."""
    schemas, definitions = _json_schemas()
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        described = paths.setdefault(operation.path, {})[operation.method] = _described(operation, schemas, has_keys)
        if operation.request is not None:
            body = {"schema": schemas[operation.name, "request"], "example": {"model": model, **operation.example}}
            described["requestBody"] = {"required": True, "content": {"application/json": body}}
    components: dict[str, Any] = {"schemas": definitions}
    if has_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    info = {"title": "mlx-ring-server", "version": VERSION, "description": ABOUT}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _json_schemas() -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """The JSON schema of each operation's types by (its name, what it is), and the definitions they refer to."""
    inputs: list[Any] = [
        ((operation.name, role), mode, TypeAdapter(kind))
        for operation in OPERATIONS
        for role, mode, kind in (
            ("request", "validation", operation.request),
            ("answer", "serialization", operation.answer),
            ("events", "serialization", operation.events),
            ("error", "serialization", AnthropicErrorResponse if operation.is_anthropic else ErrorResponse),
        )
        if kind is not None
    ]
    schemas, rest = TypeAdapter.json_schemas(
        inputs, ref_template="#/components/schemas/{model}", schema_generator=_Schemas
    )
    return {key: schema for (key, _), schema in schemas.items()}, rest.get("$defs", {})


def _described(operation: Operation, schemas: Mapping[tuple[str, str], Any], has_keys: bool) -> dict[str, Any]:
    """One operation as OpenAPI says it."""

    def content(role: str, media_type: str = "application/json") -> dict[str, Any]:
        return {media_type: {"schema": schemas[operation.name, role]}}

    answered = content("answer", operation.media_type) if operation.answer is not None else {}
    if operation.events is not None:
        answered |= content("events", "text/event-stream")
    responses: dict[str, Any] = {
        str(status): {"description": operation.summary, "content": answered} for status in operation.statuses
    }
    for status, meaning in _errors(operation, has_keys).items():
        responses[str(status)] = {"description": meaning, "content": content("error")}
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.path.split("/")[2] if operation.path.startswith("/v1/") else "server"],
        "responses": responses,
    }
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    in_query = [
        {"name": name, "in": "query", "schema": schema}
        for name, schema in (operation.query.model_json_schema()["properties"].items() if operation.query else ())
    ]
    if in_path or in_query:
        described["parameters"] = [*in_path, *in_query]
    if has_keys and operation.needs_key:
        described["security"] = [{"bearer": []}, {"x-api-key": []}]
    return described


def _errors(operation: Operation, has_keys: bool) -> dict[int, str]:
    """What its errors mean, by status."""
    errors = [*operation.errors, *([Unauthorized] if has_keys and operation.needs_key else [])]
    meanings: dict[int, str] = {}
    for error in sorted(errors, key=lambda error: ANSWERS[error].status):
        status = ANSWERS[error].status
        meanings[status] = f"{meanings[status]} {error.__doc__}" if status in meanings else str(error.__doc__)
    return meanings
