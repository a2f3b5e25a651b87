"""What surrounds every request: its id, its key, and the last resort when a handler breaks.

Plain ASGI, because Starlette's BaseHTTPMiddleware hides a client that leaves from the handler. Order, outermost first:
`RequestId`, CORS, `ApiKeyCheck`, `ErrorBoundary`, so that every answer carries its id and what a browser needs.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import EngineFailure, Unauthorized, error_response_for
from config.logging import printable
from config.values import ApiKey

logger = logging.getLogger(__name__)

# What /health answers depends on whether a key was shown; the description is what anybody can read in docs/api.md.
OPEN_PATHS = ("/health", "/openapi.json", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css")
_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Puts `x-request-id` on every answer: the client's own where it sent a sane one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _CLIENT_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class ApiKeyCheck:
    """Lets a request pass that shows one of API_KEYS; the key's label is what logs say of it."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self.app = app
        self._keys = [(entry.label, _digest(entry.key.get_secret_value())) for entry in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys:
            await self.app(scope, receive, send)
            return
        is_open = scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"
        shown = _shown_keys(Headers(scope=scope))
        label = next((label for key in shown if (label := self._label(key)) is not None), None)
        if label is None and not is_open:
            if not shown:
                message = (
                    "You didn't provide an API key. Send it in the header 'Authorization: Bearer YOUR_KEY' "
                    "or 'x-api-key: YOUR_KEY'."
                )
            else:
                message = "Incorrect API key provided."
            await error_response_for(scope, Unauthorized(message))(scope, receive, send)
            return
        if label is not None:
            scope.setdefault("state", {})["api_key_label"] = label
        await self.app(scope, receive, send)

    def _label(self, shown: str) -> str | None:
        """Compares with every key, each in the same time, so an answer's time tells nothing."""
        digest = _digest(shown)
        labels = [label for label, key in self._keys if hmac.compare_digest(digest, key)]
        return labels[0] if labels else None


def _shown_keys(headers: Headers) -> list[str]:
    """OpenAI's clients send a bearer token, Anthropic's that or `x-api-key`."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    shown = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    return [key.strip() for key in shown if key.strip()]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class ErrorBoundary:
    """An error nobody expected is logged and answered as a 500 in OpenAI's form; the server goes on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except ClientDisconnect:
            logger.info("%s %s: the client left", scope["method"], printable(scope["path"]))
        except Exception:  # the outermost frame of a request
            logger.exception("%s %s failed", scope["method"], printable(scope["path"]))
            if started:
                raise  # uvicorn closes the connection, so the client sees that the answer is not whole
            error = EngineFailure("The server had an error while processing your request.")
            await error_response_for(scope, error)(scope, receive, send)
