"""What an answer must look like, as a grammar of llguidance that the last rank enforces (`SamplingParams.grammar`).

Pure functions from the fields of a request to the grammar's text; what cannot be enforced is an `UnsupportedParameter`
that names the keyword and its place. They compile what they make, which takes milliseconds, for a large schema up to a
second: the thread that makes the prompt calls them, never the event loop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.structured.request_schemas import ANY_OBJECT, Function, call_schema, content_schema
from api.structured.schema_check import HEAD, json_rule

# Every grammar made here begins so, that another can be put around it.
START = f"{HEAD}start: answer\n"
TEXT = "TEXT: /(.|\\n)+/\n"


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens of a vocabulary that stand for no text, and those tokens that end an answer."""

    ids: Mapping[str, int]
    stop_ids: Collection[int] = ()

    @classmethod
    def of(cls, added_tokens: Mapping[int, Any], stop_ids: Collection[int]) -> SpecialTokens:
        """From the `added_tokens_decoder` of a tokenizer; llguidance takes any of them in <> for special."""
        ids = {
            token.content: token_id
            for token_id, token in added_tokens.items()
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))
        }
        return cls(ids, frozenset(stop_ids))


def json_object() -> str:
    """Any JSON object."""
    return f"{START}answer: {json_rule(ANY_OBJECT)}\n"


def json_schema(schema: dict[str, Any], *, strict: bool | None, param: str) -> str:
    """JSON that fits `schema`, properties in the schema's order; enforced whether `strict` or not.

    With `strict`, keywords that no specification knows are refused; else they are annotations, as JSON Schema says.

    Raises:
        InvalidRequest, UnsupportedParameter: they name `param` and the place in the schema.
    """
    return f"{START}answer: {json_rule(content_schema(schema, strict=bool(strict), param=param))}\n"


def tool_calls(
    functions: Sequence[Function],
    *,
    begin: str,
    end: str,
    required: bool,
    parallel: bool,
    special_tokens: SpecialTokens,
    separator: str = "\n",
    name_key: str = "name",
    arguments_key: str = "arguments",
) -> str:
    """Calls in JSON, each `begin` {"name": …, "arguments": {…}} `end`.

    With `required` an answer is calls and nothing else; without it, it is text in which the marker `begin` always
    begins a call. The schemas of strict functions are enforced; those of others only with `required`, and then without
    what cannot be enforced, as a schema that is not strict is no promise.

    Args:
        functions: that may be called; for a named one that one alone.
        begin: the marker, and the white space that belongs to it. What in it is a special token is drawn as that token.
        end: the same; "" where the JSON is all.
        required: at least one call.
        parallel: more than one call, with or without `separator` between them; else the answer ends with the call.

    Raises:
        InvalidRequest, UnsupportedParameter: they name the function's `param` and the place in the schema.
    """
    calls = json_rule(call_schema(functions, required=required, name_key=name_key, arguments_key=arguments_key))
    closing = _exactly(end, special_tokens)
    if required:
        more = f" ({_exactly(separator, special_tokens)}? call)*" if separator else " call*"
        call = f"call: {_exactly(begin, special_tokens)} {calls} {closing}\n"
        return f"{START}answer: call{more if parallel else ''}\n{call}"
    marker = begin.rstrip()
    if not marker:
        raise ValueError("nothing tells where in a text a call begins")
    gap = _exactly(begin[len(marker) :], special_tokens)
    free = f"free: {_free(special_tokens, except_for=marker)}\n"
    call = f"call: opening {gap} {calls} {closing}\n{_up_to(marker, special_tokens, 'opening')}"
    return f"{START}answer: {'call* free' if parallel else 'call | free'}\n{call}{free}{TEXT}"


def answer_rule(grammar: str) -> str:
    """What stands in the rule `answer` of a grammar of `json_object` or `json_schema`."""
    return grammar.removeprefix(START).removeprefix("answer:").strip()


def either(content: str, calls: str) -> str:
    """An answer that fits the one or the other of two grammars of this module, of content and of `tool_calls`."""
    rules = [grammar.removeprefix(START).removeprefix("answer:") for grammar in (content, calls)]
    return f"{START}answer: content | calls\ncontent:{rules[0]}calls:{rules[1]}"


def after_reasoning(grammar: str, *, end: str, special_tokens: SpecialTokens, begin: str | None = None) -> str:
    """`grammar`, made by this module, after a block of reasoning: any text, up to the marker `end`.

    Args:
        begin: None where the prompt has opened the block; else the marker that a model may open one with.
    """
    block = "reasoning /\\n{1,2}/?"
    if begin is not None:
        block = f"({_exactly(begin, special_tokens)} {block})?"
    text = "" if TEXT in grammar else TEXT
    reasoning = _up_to(end.strip(), special_tokens, "reasoning")
    return f"{HEAD}start: {block} answer\n{grammar.removeprefix(START)}{reasoning}{text}"


# -- what grammars are made of ---------------------------------------------------------------------------------------


def _exactly(text: str, special_tokens: SpecialTokens) -> str:
    """This text, its special tokens as tokens."""
    return " ".join(_part(part, special_tokens) for part in _split(text, special_tokens)) or '""'


def _part(part: str, special_tokens: SpecialTokens) -> str:
    if part in special_tokens.ids:
        return f"<[{special_tokens.ids[part]}]>"
    return json.dumps(part, ensure_ascii=False)


def _split(text: str, special_tokens: SpecialTokens) -> list[str]:
    """Special tokens and what is between them."""
    known = sorted((token for token in special_tokens.ids if token in text), key=len, reverse=True)
    if not known:
        return [text] if text else []
    return [part for part in re.split(f"({'|'.join(map(re.escape, known))})", text) if part]


def _up_to(marker: str, special_tokens: SpecialTokens, name: str) -> str:
    """Rules of `name`: any text up to the first `marker`, that included."""
    first, *rest = _split(marker, special_tokens)
    tail = " ".join(_part(part, special_tokens) for part in rest)
    if first in special_tokens.ids:
        return f"{name}: {_free(special_tokens, except_for=first)} {_part(first, special_tokens)} {tail}\n"
    before = f"({name}-token)* " if (others := _others(special_tokens, first)) else ""
    token = f"{name}-token: TEXT? {others}\n" if others else ""
    return (
        f"{name}: {before}{name}-end {tail}\n{token}"
        f"{name}-end[lazy]: /(.|\\n)*/ {json.dumps(first, ensure_ascii=False)}\n"  # the shortest text that ends so
    )


def _free(special_tokens: SpecialTokens, except_for: str) -> str:
    """Any text, and any special tokens but the one that `except_for` begins with."""
    others = _others(special_tokens, except_for)
    return f"(TEXT | {others})*" if others else "TEXT?"


def _others(special_tokens: SpecialTokens, except_for: str) -> str:
    """One of the special tokens that do not end an answer, but the one that `except_for` begins with."""
    first = _split(except_for, special_tokens)[0]
    ids = {token_id for token, token_id in special_tokens.ids.items() if token != first}
    return _ranges(sorted(ids.difference(special_tokens.stop_ids)))


def _ranges(token_ids: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for token_id in token_ids:
        if ranges and ranges[-1][1] == token_id - 1:
            ranges[-1][1] = token_id
        else:
            ranges.append([token_id, token_id])
    return f"<[{','.join(f'{start}-{end}' for start, end in ranges)}]>" if ranges else ""
