"""The served model's tokenizer: from chat messages to prompt ids, and from sampled ids back to text.

It is mlx-lm's own tokenizer and detokenizer with the model's chat template, so prompts are what mlx-lm would make. It
loads no weights and evaluates no array. The supervisor loads it when a ring is ready; the routes call it in a thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config, load_tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from api.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from api.schemas import AssistantMessage, DeveloperMessage, Message, ToolMessage
from api.text import TextStream

logger = logging.getLogger(__name__)

# What a template does with messages it was not written for, besides raising an error of its own.
_TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class SamplingDefaults:
    """What the model's generation_config.json asks for; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class ChatTokenizer:
    """Everything the api knows of one model folder. Its methods may be called from several threads."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        """Load the folder `path`, in Hugging Face's layout. Raises OSError or ValueError for a broken one."""
        config = load_config(path)
        extra = {"trust_remote_code": True} if trust_remote_code else {}
        self._tokenizer: TokenizerWrapper = load_tokenizer(path, extra, eos_token_ids=config.get("eos_token_id"))
        self.path = path
        self.sampling_defaults = _sampling_defaults(path)
        self.stop_token_ids: list[int] = sorted(self._tokenizer.eos_token_ids)
        self.fingerprint = f"fp_{hashlib.sha256((path / 'config.json').read_bytes()).hexdigest()[:10]}"
        if not self._tokenizer.has_chat_template:
            logger.warning("%s has no chat template: chat requests will be refused", path)

    def encode_chat(self, messages: Sequence[Message], max_tokens: int) -> list[int]:
        """The prompt's ids: the messages in the model's chat template, and the start of the answer.

        Control tokens that the messages' text spells out are encoded as text. Raises InvalidRequest where the template
        cannot render the messages, UnsupportedParameter where it has no place for a field of theirs, and
        ContextLengthExceeded where the text is surely longer than `max_tokens`.
        """
        if not self._tokenizer.has_chat_template:
            raise InvalidRequest("The served model has no chat template, so it cannot take messages.", param="messages")
        self._check_size(messages, max_tokens)
        self._check_tools(messages)
        token_ids = self._render(messages)
        self._check_names(messages, token_ids)
        return token_ids

    def _render(self, messages: Sequence[Message]) -> list[int]:
        # A tokenizer with a renderer of its own has no such switch; those build ids without parsing text.
        options = {"sanitize_control_tokens": True} if self._renders_with_jinja else {}
        try:
            token_ids = self._tokenizer.apply_chat_template(
                [self._for_template(message) for message in messages], add_generation_prompt=True, **options
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"The served model's chat template cannot render these messages: {error}",
                param="messages",
                code="invalid_messages",
            ) from error
        return list(token_ids)

    def text_stream(self, stop: Sequence[str]) -> TextStream:
        """For the answer to one request."""
        return TextStream(self._tokenizer.detokenizer, stop, self._hidden_ids)

    @cached_property
    def _hidden_ids(self) -> frozenset[int]:
        """Tokens that are no text: special ones, and ids of a padded vocabulary that the tokenizer does not know."""
        padding = range(len(self._tokenizer), len(self._tokenizer) + 4096)
        return frozenset([*self._tokenizer.all_special_ids, *self.stop_token_ids, *padding])

    @cached_property
    def _longest_token(self) -> int:
        return max(len(token) for token in self._tokenizer.get_vocab())

    @property
    def _renders_with_jinja(self) -> bool:
        renderer = getattr(type(self._tokenizer._tokenizer), "apply_chat_template", None)
        return self._tokenizer._chat_template is None and renderer is PreTrainedTokenizerBase.apply_chat_template

    def _check_size(self, messages: Sequence[Message], max_tokens: int) -> None:
        """Refuses megabytes before they are tokenized. The factor is for tokenizers that shorten text first."""
        if len(messages) > max_tokens:  # each is a token at least
            raise context_length_exceeded(max_tokens, f"more than {len(messages)} tokens")
        length = sum(len(message.text) for message in messages)
        if length > 4 * max_tokens * self._longest_token:
            raise context_length_exceeded(max_tokens, f"{length} characters")

    def _check_tools(self, messages: Sequence[Message]) -> None:
        if self._template_names("tool_calls"):  # such a template may know results by their order, without the id
            return
        for place, message in enumerate(messages):
            if _tool_calls(message):
                raise _no_place(f"messages[{place}].tool_calls")
            if isinstance(message, ToolMessage) and not self._template_names("tool_call_id"):
                raise _no_place(f"messages[{place}].tool_call_id")

    def _check_names(self, messages: Sequence[Message], token_ids: list[int]) -> None:
        """Templates use names of some roles, or of none; only the prompt without them tells."""
        # The first message with a name of each role.
        first_places = {message.role: place for place, message in reversed(list(enumerate(messages))) if message.name}
        for role, place in first_places.items():
            nameless = [
                message.model_copy(update={"name": None}) if message.role == role else message for message in messages
            ]
            try:
                is_used = self._render(nameless) != token_ids
            except InvalidRequest:  # the template insists on names
                is_used = True
            if not is_used:
                raise _no_place(f"messages[{place}].name")

    def _template_names(self, word: str) -> bool:
        """Whether the template's source names `word`; True where there is no source to look at."""
        return not self._renders_with_jinja or word in str(self._tokenizer.chat_template)

    def _for_template(self, message: Message) -> dict[str, Any]:
        role: str = message.role
        if isinstance(message, DeveloperMessage) and not self._template_names("developer"):
            role = "system"
        fields: dict[str, Any] = {"role": role, "content": message.text}
        if message.name:
            fields["name"] = message.name
        if isinstance(message, ToolMessage):
            fields["tool_call_id"] = message.tool_call_id
        if calls := _tool_calls(message):
            fields["tool_calls"] = calls
        return fields


def context_length_exceeded(max_tokens: int, resulted_in: str) -> ContextLengthExceeded:
    """OpenAI's words for a prompt that is too long."""
    return ContextLengthExceeded(
        f"This model's maximum context length is {max_tokens} tokens. However, your messages resulted in "
        f"{resulted_in}. Please reduce the length of the messages.",
        param="messages",
    )


def _no_place(name: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"The served model's chat template has no place for '{name}'.", param=name)


def _tool_calls(message: Message) -> list[dict[str, Any]]:
    """The calls as chat templates expect them: arguments as an object."""
    if not isinstance(message, AssistantMessage):
        return []
    calls = []
    for call in message.tool_calls or []:
        try:
            arguments = json.loads(call.function.arguments)
        except ValueError:
            arguments = call.function.arguments  # a model may write what is no JSON; the template sees the text
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": call.type, "function": function})
    return calls


def _sampling_defaults(path: Path) -> SamplingDefaults:
    file = path / "generation_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        logger.warning("%s is not JSON (%s); its sampling defaults are not used", file, error)
        values = {}
    names = SamplingDefaults.__dataclass_fields__
    numbers = {name: values.get(name) for name in names if type(values.get(name)) in (int, float)}
    return SamplingDefaults(**numbers)
