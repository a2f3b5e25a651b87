"""Paths of OpenAI's that this server does not serve: a 404 in OpenAI's form that says what it does serve.

Without it they would be a 404 as well, one that looks like a mistyped URL. Whatever is served has its own route, asked
before these.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.errors import NotFound

router = APIRouter()

PATHS = (
    "assistants",
    "audio",
    "batches",
    "chat/completions/{completion_id}",  # stored ones: nothing is stored
    "chatkit",
    "containers",
    "conversations",
    "edits",
    "embeddings",
    "engines",
    "evals",
    "files",
    "fine_tuning",
    "fine-tunes",
    "images",
    "moderations",
    "organization",
    "projects",
    "realtime",
    "responses/compact",
    "skills",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


async def refuse(request: Request) -> Response:
    raise NotFound(
        f"Invalid URL ({request.method} {request.url.path}): this server serves text generation only. It has "
        "/v1/chat/completions, /v1/responses, /v1/messages, /v1/completions, /v1/models, /tokenize and /detokenize."
    )


for path in PATHS:
    router.add_route(f"/v1/{path}", refuse, methods=METHODS, include_in_schema=False)
    router.add_route(f"/v1/{path}/{{rest:path}}", refuse, methods=METHODS, include_in_schema=False)
