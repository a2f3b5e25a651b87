"""What every error is answered with: OpenAI's object, and Anthropic's on its paths. `api.errors` fills them."""

from __future__ import annotations

from typing import Literal

from api.schemas.base import Sent


class ErrorObject(Sent):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Sent):
    """What went wrong, for people (`message`) and for programs (`code`); `param` names the field."""

    error: ErrorObject


class AnthropicErrorObject(Sent):
    type: str
    message: str


class AnthropicErrorResponse(Sent):
    """Anthropic's form, on /v1/messages and below."""

    type: Literal["error"]
    error: AnthropicErrorObject
    request_id: str
