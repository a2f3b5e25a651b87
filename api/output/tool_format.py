"""How a model writes its calls of tools: between which markers, and how what is between them becomes calls.

A model's native format is what its chat template and mlx-lm's tool parser say; every other model is offered tools by a
text, and writes a call as JSON, the form that Hermes and Qwen models know. Plain functions; they hold no state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools

# What a parser does with text that is no call, besides raising an error of its own.
# `ast` answers deep nesting with a MemoryError.
_PARSER_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, RecursionError, MemoryError
)  # fmt: skip


@dataclass(frozen=True)
class FoundCall:
    """A call that the model wrote. `arguments` is JSON text; `id` is set where the format has ids of its own."""

    name: str
    arguments: str
    id: str | None = None


class NotACall(Exception):
    """Text between the markers that is no call."""


@dataclass(frozen=True)
class ToolFormat:
    start: str
    end: str  # "": the end of the answer
    parser: Callable[[str, Sequence[Any]], Any] | None  # mlx-lm's
    is_json: bool = False  # {"name": …, "arguments": {…}}, so a grammar can enforce it and arguments can be streamed
    is_harmony: bool = False  # so it has a reader and grammars of its own

    @property
    def is_enforceable(self) -> bool:
        """Whether there are grammars of it."""
        return self.is_json or self.is_harmony

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> list[FoundCall]:
        """The calls of a whole text between the markers. Raises NotACall."""
        assert self.parser is not None
        try:
            parsed = self.parser(text, tools)
            calls = [_found(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except _PARSER_ERRORS as error:
            raise NotACall from error
        if not calls:
            raise NotACall
        return calls


def _found(call: Any) -> FoundCall:
    name, arguments = call["name"], call.get("arguments", call.get("parameters"))
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    if not isinstance(arguments, str):  # some models write the object as a string
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False, allow_nan=False)
    (name + arguments).encode()  # half a surrogate pair cannot be sent
    call_id = call.get("id")
    return FoundCall(name, arguments.strip() or "{}", call_id if isinstance(call_id, str) and call_id else None)


HARMONY = ToolFormat("", "", None, is_harmony=True)  # api.output.harmony
GENERIC = ToolFormat(json_tools.tool_call_start, json_tools.tool_call_end, json_tools.parse_tool_call, is_json=True)


def native_format(tokenizer: TokenizerWrapper) -> ToolFormat | None:
    """The format of mlx-lm's parser for this model, where it has one."""
    start, end, parser = tokenizer.tool_call_start, tokenizer.tool_call_end, tokenizer.tool_parser
    if not start or parser is None:
        return None
    return ToolFormat(start, end or "", parser, is_json=parser is json_tools.parse_tool_call)


# -- the generic format's texts --------------------------------------------------------------------------------------


def offer_text(tools: Sequence[dict[str, Any]]) -> str:
    """For a system message: the functions, and how to call them. The words are those Qwen models are trained with."""
    functions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{functions}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"{GENERIC.start}{GENERIC.end} XML tags:\n"
        f'{GENERIC.start}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{GENERIC.end}'
    )


def call_text(name: str, arguments: Any) -> str:
    """A call that the model made before."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{GENERIC.start}\n{call}\n{GENERIC.end}"


def result_text(result: str) -> str:
    """What a tool answered."""
    return f"<tool_response>\n{result}\n</tool_response>"
