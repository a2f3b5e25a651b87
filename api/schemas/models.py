"""What /v1/models answers: OpenAI's object, and what the model can do as an extension."""

from __future__ import annotations

from typing import Literal

from api.schemas.base import Sent


class Capabilities(Sent):
    """What requests may ask of the model; False is refused with a 400 or a 404."""

    chat: bool
    completions: bool
    tools: bool
    structured_output: bool
    reasoning: bool
    vision: bool
    audio: bool
    embeddings: bool


class Model(Sent):
    """The extensions are null while no ring is ready: it is the ring that knows them."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int | None  # tokens, prompt and answer together; OpenRouter's name
    max_model_len: int | None  # the same, vLLM's name
    capabilities: Capabilities | None


class ModelList(Sent):
    object: Literal["list"]
    data: list[Model]
