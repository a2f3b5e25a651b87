"""What /tokenize and /detokenize take and give: vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from api.schemas.base import MAX_MESSAGES, Received, Sent, TokenId, conflict, only
from api.schemas.chat import MAX_TOOLS, Message, Tool, tool_names


class TokenizeRequest(Received):
    """POST /tokenize: a raw `prompt`, or `messages` as a chat would send them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    # documented by vLLM, not done
    add_generation_prompt: Annotated[Any, only(True)] = None
    chat_template: Annotated[Any, only()] = None
    continue_final_message: Annotated[Any, only(False)] = None

    @model_validator(mode="after")
    def _goes_together(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "Give either 'prompt' or 'messages', and not both.")
        if self.messages is None:
            for name in ("tools", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise conflict(name, f"'{name}' is only allowed together with 'messages'.")
        elif self.add_special_tokens:
            message = "With 'messages' the chat template says which special tokens there are."
            raise conflict("add_special_tokens", message)
        tool_names(self.tools)
        return self


class TokenizeResponse(Sent):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Received):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizeResponse(Sent):
    prompt: str
