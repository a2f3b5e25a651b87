"""What /v1/completions takes and gives: OpenAI's reference for the endpoint that came before chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from api.schemas.base import NumChoices, Performance, SamplingFields, Sent, TokenId, Usage, conflict, only

DEFAULT_MAX_TOKENS = 16  # OpenAI's for this endpoint
MAX_LOGPROBS = 5
MAX_ANSWERS = 1024  # of one request: its prompts times the choices of each

# -- the request -----------------------------------------------------------------------------------------------------

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _prompt_kind(value: Any) -> str | None:
    """By the first entry: a list of anything else than ids is a list of prompts."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    return {int: "ids", list: "id_lists"}.get(type(value[0]) if value else str, "texts")


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts"), Field(min_length=1, max_length=MAX_ANSWERS, fail_fast=True)]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Tag("id_lists"), Field(max_length=MAX_ANSWERS, fail_fast=True)],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="expected a string, an array of strings, of token ids, or of arrays of token ids",
    ),
]


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    model: str
    prompt: Prompt | None  # null: what an empty text is
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    best_of: NumChoices | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _goes_together(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
        if self.best_of is not None and self.best_of < self.num_returned:
            message = f"'best_of' ({self.best_of}) must not be smaller than 'n' ({self.num_returned})."
            raise conflict("best_of", message)
        if self.stream and self.num_choices > self.num_returned:
            raise conflict("best_of", "The best of several answers cannot be streamed: 'best_of' must be 'n' here.")
        if self.token_limit == 0 and not self.echo:
            raise conflict("max_tokens", "'max_tokens' may be 0 only together with 'echo'.")
        if len(self.prompts) * self.num_choices > MAX_ANSWERS:
            message = (
                f"{len(self.prompts)} prompts with {self.num_choices} answers each are more than the {MAX_ANSWERS} "
                "answers that one request may ask for."
            )
            raise conflict("prompt", message)
        return self

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or as ids."""
        prompt: Any = self.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        return [prompt] if isinstance(prompt[0], int) else prompt

    def prompt_name(self, place: int) -> str:
        """How an error names the prompt at this place."""
        return f"prompt[{place}]" if _prompt_kind(self.prompt) in ("texts", "id_lists") else "prompt"

    @property
    def prompt_bytes(self) -> int:
        """Of the longest text."""
        return max(len(prompt.encode()) if isinstance(prompt, str) else 0 for prompt in self.prompts)

    @property
    def num_returned(self) -> int:
        """Choices of each prompt that the client gets."""
        return self.n or 1

    @property
    def num_choices(self) -> int:
        """Choices of each prompt that run."""
        return self.best_of or self.num_returned

    @property
    def token_limit(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_sampled_logprobs(self) -> int | None:
        """How many alternatives come with each sampled token's logprob; None where nobody needs any."""
        if self.logprobs is None and self.num_choices > self.num_returned:
            return 0  # the best are found by them
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's own tokens."""
        return self.logprobs if self.echo else None


# -- the answer ------------------------------------------------------------------------------------------------------


class CompletionLogprobs(Sent):
    """Lists that go side by side, an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Sent):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Sent):
    """A whole answer, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    performance: Performance | None = None
