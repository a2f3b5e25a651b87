"""The served model's chat template: what it has a place for, and the prompt it makes of messages.

Templates come with models and are programs: transformers runs them in a sandbox, and here whatever goes wrong in one is
the client's error. Text of a request is never part of a program, and control tokens that it spells out are encoded as
text. Used by `api.chat.prompt`, in threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _get_template_variables, encode_marked_chat, mark_control_tokens

from api.errors import InvalidRequest, UnsupportedParameter
from api.output import harmony

# What a template does with messages it was not written for, besides raising an error of its own.
_TEMPLATE_ERRORS = (
    TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, NotImplementedError,
)  # fmt: skip
_SYSTEM, _USER = ({"role": role, "content": role} for role in ("system", "user"))
_SWITCHES = ("enable_thinking", "thinking")  # what templates call it: most of them, DeepSeek


class ChatTemplate:
    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._model_tokenizer: Any = tokenizer._tokenizer
        renderer = getattr(type(self._model_tokenizer), "apply_chat_template", None)
        self._is_function = tokenizer._chat_template is not None  # one of mlx-lm's own
        self._is_jinja = not self._is_function and renderer is PreTrainedTokenizerBase.apply_chat_template
        self.exists: bool = tokenizer.has_chat_template
        self.is_harmony: bool = self._is_jinja and harmony.is_spoken(tokenizer.get_vocab(), self._sources)

    # -- what it has a place for -------------------------------------------------------------------------------------

    def names(self, word: str) -> bool:
        """Whether the template's source names `word`; True where there is no source to look at."""
        return not self._is_jinja or any(word in source for source in self._sources)

    @cached_property
    def variables(self) -> frozenset[str] | None:
        """What it can be rendered with; None where there is no source to look at."""
        if not self._is_jinja:
            return None
        try:
            return frozenset().union(*[_get_template_variables(source) for source in self._sources])
        except TemplateError:
            return frozenset()  # rendering it says what is wrong

    def takes(self, variable: str) -> bool:
        return self.variables is None or variable in self.variables

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message makes a difference; some templates refuse it, some leave it out."""
        return self._heeds([_SYSTEM, _USER], without=[_USER])

    @cached_property
    def takes_several_systems(self) -> bool:
        """Whether a second system message at the beginning makes a difference, too."""
        return self._heeds([_SYSTEM, _SYSTEM, _USER], without=[_SYSTEM, _USER])

    @cached_property
    def takes_late_system(self) -> bool:
        """Whether a system message behind the user's makes a difference, too."""
        return self._heeds([_USER, _SYSTEM], without=[_USER])

    def _heeds(self, messages: Sequence[dict[str, Any]], *, without: Sequence[dict[str, Any]]) -> bool:
        """Whether it takes `messages`, and what they have more than those `without` it makes a difference."""
        try:
            return self.render(messages) != self.render(without)
        except InvalidRequest:
            return False

    @property
    def can_think(self) -> bool:
        """Whether the model thinks before it answers. To have the tokens for it is not enough: whole families do."""
        if self.is_harmony:
            return True
        start, end = self._tokenizer.think_start, self._tokenizer.think_end
        if not start or not end:
            return False
        return self.names(start) or self.names(end) or self.thinking_switch is not None

    @property
    def thinking_switch(self) -> str | None:
        """The variable that switches thinking on and off."""
        if self.variables is None:
            return self._tokenizer._thinking_kwarg
        return next((name for name in _SWITCHES if name in self.variables), None)

    # -- the prompt --------------------------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        continues: bool = False,
    ) -> list[int]:
        """The prompt's ids: the messages and the start of the answer. Raises InvalidRequest where it cannot be made.

        `continues`: the last message is the start of the answer. Raises UnsupportedParameter where that cannot be.
        """
        if continues and not self._is_jinja:
            name = "continue_final_message"
            raise UnsupportedParameter(f"The served model's chat template cannot do '{name}'.", param=name)
        options = dict(variables or {})
        # One or the other; not both, not none.
        options |= {"continue_final_message": True} if continues else {"add_generation_prompt": True}
        self._check_member_names(messages=messages, tools=tools, chat_template_kwargs=options)
        if tools:
            options["tools"] = list(tools)
        try:
            return list(self._ids(list(messages), options))
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"The served model's chat template cannot render these messages: {error}",
                param="messages",
                code="invalid_messages",
            ) from error

    def _ids(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        render = self._tokenizer.apply_chat_template
        if self._is_jinja:
            return render(messages, sanitize_control_tokens=True, **options)
        if self._is_function:
            marked = mark_control_tokens({"messages": messages, "options": options}, self._control_tokens)
            text = render(marked["messages"], tokenize=False, **marked["options"])
            return encode_marked_chat(self._model_tokenizer, text)
        return render(messages, **options)  # a tokenizer's own, which makes ids itself

    def _check_member_names(self, **values: Any) -> None:
        """Templates may write whole objects; their strings are made safe by rendering, their members' names are not."""
        for param, value in values.items():
            for name in _member_names(value):
                if found := self._control_tokens.search(name):
                    raise InvalidRequest(
                        f"Invalid '{param}': the name of a member holds '{found[0]}', a control token of the model.",
                        param=param,
                        code="invalid_value",
                    )

    @cached_property
    def _sources(self) -> list[str]:
        template = self._model_tokenizer.chat_template
        return list(template.values()) if isinstance(template, dict) else [template or ""]

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        tokens = [
            token.content
            for token in getattr(self._model_tokenizer, "added_tokens_decoder", {}).values()
            if (token.special or self.names(token.content)) and not token.content.isspace()
        ]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _member_names(value: Any) -> Iterator[str]:
    """The names of all objects' members, however deep."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            yield from value
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
