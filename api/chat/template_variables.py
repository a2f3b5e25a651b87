"""What a request says about the rendering of its prompt: `chat_template_kwargs`, `reasoning_effort`, and their switch.

What the served model's template does not know is refused by name. Called by `api.chat.prompt`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from api.chat.template import ChatTemplate
from api.errors import InvalidRequest, UnsupportedParameter
from api.schemas.chat import ChatCompletionRequest

# Arguments of transformers that are not for the template, or that the request says in other fields.
_OURS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {"documents"}
_SWITCH = "enable_thinking"  # whatever the template calls it
_HARMONY_EFFORTS = ("low", "medium", "high")  # that gpt-oss was trained with


@dataclass(frozen=True)
class TemplateVariables:
    values: dict[str, Any]
    thinking: bool | None  # as the request wants it; None: it does not say


def template_variables(chat: ChatCompletionRequest, template: ChatTemplate) -> TemplateVariables:
    """Raises InvalidRequest and UnsupportedParameter for what the template does not know."""
    values = dict(chat.chat_template_kwargs or {})
    thinking = _switch(values, template)
    for name in values:
        if name in _OURS or name.endswith("_token"):
            raise _invalid(name, "it cannot be set, the server sets it")
        if not template.takes(name):
            raise _no_place(name)
    effort = chat.reasoning_effort
    if effort is not None:
        if thinking is (effort == "none"):
            raise _invalid(_SWITCH, "'reasoning_effort' says the opposite")
        if values.get("reasoning_effort", effort) != effort:
            raise _invalid("reasoning_effort", "the field 'reasoning_effort' says something else")
        thinking = effort != "none"
        if _takes_effort(template):
            values["reasoning_effort"] = effort
        elif not template.can_think and effort not in ("none", "medium"):
            raise UnsupportedParameter(
                "Unsupported parameter: 'reasoning_effort'. The served model does not reason before it answers; "
                "leave it out, or send 'none'.",
                param="reasoning_effort",
            )
    if template.is_harmony:
        _check_harmony(values, effort, thinking)
    if thinking is not None and template.thinking_switch is not None:
        values[template.thinking_switch] = thinking
    return TemplateVariables(values, thinking)


def _check_harmony(values: dict[str, Any], effort: str | None, thinking: bool | None) -> None:
    """Its template writes any effort into the prompt, and offers tools that nobody here runs."""
    if "builtin_tools" in values:
        raise UnsupportedParameter(
            "Unsupported parameter: 'chat_template_kwargs.builtin_tools'. This server runs no tools; "
            "offer functions of your own in 'tools'.",
            param="chat_template_kwargs.builtin_tools",
        )
    if thinking is False and values.get("reasoning_effort", "none") == "none":  # a grammar sees to it
        values["reasoning_effort"] = _HARMONY_EFFORTS[0]
    if effort not in (None, "none", *_HARMONY_EFFORTS):
        raise UnsupportedParameter(
            f"Unsupported value: 'reasoning_effort' does not support '{effort}' with the served model; "
            "send 'none', 'low', 'medium' or 'high'.",
            param="reasoning_effort",
        )
    if values.get("reasoning_effort", "low") not in _HARMONY_EFFORTS:
        raise _invalid("reasoning_effort", "the served model knows 'low', 'medium' and 'high'")


def _switch(values: dict[str, Any], template: ChatTemplate) -> bool | None:
    """Takes the switch for thinking out of the client's values."""
    thinking = None
    for name in dict.fromkeys((_SWITCH, template.thinking_switch or _SWITCH)):
        if name not in values:
            continue
        value = values.pop(name)
        if not isinstance(value, bool):
            raise _invalid(name, "expected a boolean")
        if thinking not in (None, value):
            raise _invalid(name, f"'{_SWITCH}' says the opposite")
        if value and not template.can_think and template.thinking_switch is None:
            raise _no_place(name)
        thinking = value
    return thinking


def _takes_effort(template: ChatTemplate) -> bool:
    return template.variables is not None and "reasoning_effort" in template.variables


def _invalid(name: str, why: str) -> InvalidRequest:
    name = f"chat_template_kwargs.{name}"
    return InvalidRequest(f"Invalid '{name}': {why}.", param=name, code="invalid_value")


def _no_place(name: str) -> UnsupportedParameter:
    name = f"chat_template_kwargs.{name}"
    return UnsupportedParameter(f"The served model's chat template has no place for '{name}'.", param=name)
