"""The prompts of /v1/completions as token ids: text is encoded as mlx-lm encodes it, ids are checked.

Control tokens that a text spells out are control tokens here: a raw prompt is the whole of what the model sees, and who
sends one writes the template too. Nothing that does not fit is tokenized. Called by the service, in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from api.errors import ContextLengthExceeded, InvalidRequest
from api.schemas.completions import CompletionRequest
from api.tokenizer import ChatTokenizer
from server.protocol import Ready


def completion_prompts(request: CompletionRequest, tokenizer: ChatTokenizer, ready: Ready) -> list[list[int]]:
    """The ids of each prompt, at least one. Raises ApiError for what this model cannot take."""
    if request.logprobs is not None:
        tokenizer.load_bytes()
    prompts = []
    for place, prompt in enumerate(request.prompts):
        name = request.prompt_name(place)
        if isinstance(prompt, str):
            token_ids = text_ids(prompt, tokenizer, ready, name) or _beginning(tokenizer, name)
        else:
            token_ids = prompt
        check_ids(token_ids, ready, name)
        if len(token_ids) >= ready.max_sequence_length:
            raise _too_long(name, f"{len(token_ids)} tokens", ready)
        prompts.append(token_ids)
    return prompts


def text_ids(
    text: str, tokenizer: ChatTokenizer, ready: Ready, name: str, *, add_special_tokens: bool = True
) -> list[int]:
    """The ids of `text`, the parameter `name`. Raises ContextLengthExceeded where they surely would be too many."""
    if tokenizer.is_surely_longer(text, ready.max_sequence_length):
        raise _too_long(name, f"{len(text)} characters", ready)
    return tokenizer.encode_prompt(text, add_special_tokens=add_special_tokens)


def check_ids(token_ids: Iterable[int], ready: Ready, name: str) -> None:
    """Raises InvalidRequest for an id that the model has no embedding for; it would read foreign memory."""
    for place, token_id in enumerate(token_ids):
        if not 0 <= token_id < ready.vocab_size:
            raise InvalidRequest(
                f"Invalid '{name}[{place}]': token id {token_id} is not in the model's vocabulary of "
                f"{ready.vocab_size} tokens.",
                param=f"{name}[{place}]",
                code="invalid_value",
            )


def _beginning(tokenizer: ChatTokenizer, name: str) -> list[int]:
    """What a model continues that is given no text."""
    if tokenizer.beginning is None:
        raise InvalidRequest(
            f"'{name}' is empty, and this model has no token for the beginning of a text. Send some text.",
            param=name,
            code="invalid_value",
        )
    _, token_id = tokenizer.beginning
    return [token_id]


def _too_long(name: str, length: str, ready: Ready) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {ready.max_sequence_length} tokens, prompt and completion together. "
        f"However, '{name}' has {length}. Please reduce the length of the prompt.",
        param=name,
    )
