"""What the schemas of all endpoints share: the two bases, documented fields that are not done, and sampling's fields.

A field of a reference is in an endpoint's schema whether this server does it or not: one that it does not do is
`only(…)` the values that ask for nothing. So a name that is not there is documented nowhere. No policy: defaults,
limits of the model and the chat template are applied later. docs/api.md says the same in words.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 1024  # characters; how much text a stream may have to hold back
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 10_000  # or items, of one request
NOT_DONE = "Not done by this server: no other value is taken."  # how a schema describes such a field


class Received(BaseModel):
    """Base of what clients send: JSON's own types (no "1" for 1), and no field that is not named here."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class Sent(BaseModel):
    """Base of what clients get. Serialized with `exclude_unset`: what a message must not have is not set."""

    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


def unsupported(*accepted: Any) -> PydanticCustomError:
    """For a documented value that is not done, where these are."""
    return PydanticCustomError("unsupported", "not supported by this server", {"accepted": accepted})


class only:  # reads as a word of the schema
    """A documented field that is not done: null and the values that ask for nothing are fine, the rest is a 400."""

    def __init__(self, *neutral: Any) -> None:
        self._neutral = neutral

    def _check(self, value: Any) -> Any:
        if value is None or any(type(value) is type(other) and value == other for other in self._neutral):
            return value
        raise unsupported(None, *self._neutral)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self._neutral], "description": NOT_DONE}


def conflict(param: str, message: str) -> PydanticCustomError:
    """For a schema's check of fields that do not go together: `message` is what the client reads, about `param`."""
    return PydanticCustomError("conflict", "{message}", {"param": param, "message": message})


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    for name in bias:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", name):
            raise PydanticCustomError("token_id", "every key must be a token id of the model's vocabulary")
    return bias


def _stop_strings(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("stop_type", "expected a string or an array of strings")
    return [value] if isinstance(value, str) else value


_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_MetadataKey = Annotated[str, Field(max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]

Stop = Annotated[
    list[_StopString],
    BeforeValidator(_stop_strings, json_schema_input_type=str | list[_StopString]),
    Field(max_length=MAX_STOP_STRINGS),
]
LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_token_ids)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Probability = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
# A function for each, so that other threads get their turn while a long list of them is checked.
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), AfterValidator(lambda value: value)]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
Metadata = Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=16)]
NumChoices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]


class StreamOptions(Received):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class SamplingFields(Received):
    """What /v1/chat/completions and /v1/completions name alike, OpenAI's fields and the extensions of vLLM."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    n: NumChoices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # extensions that vLLM and llama.cpp have
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), AfterValidator(lambda value: max(value, 0))] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None  # smaller goes first

    @property
    def token_limit(self) -> int | None:
        """How many tokens the client allows the answer, None where it names no limit."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class PromptTokensDetails(Sent):
    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(Sent):
    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Sent):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Performance(Sent):
    """Our extension: where the time of one request went. Seconds, and decoded tokens a second."""

    total_time: float
    tokens_per_second: float
    queue_time: float
    prefill_time: float
    time_to_first_token: float
    decode_time: float
