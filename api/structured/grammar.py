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
from functools import lru_cache
from typing import Any

from api.errors import InvalidRequest, UnsupportedParameter
from api.structured.json_schema import Schemas
from api.structured.schema_check import HEAD, check, json_rule
from api.structured.schema_cost import SchemaError, SchemaTooLarge, UnsupportedKeyword

MAX_SCHEMA_BYTES = 256 * 1024  # of one schema, as JSON
MAX_TOOLS_BYTES = 1024 * 1024  # of all functions' schemas together

# Every grammar made here begins so, that another can be put around it.
START = f"{HEAD}start: answer\n"
TEXT = "TEXT: /(.|\\n)+/\n"
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Function:
    """A tool as the request gives it; `param` names its schema's field: `tools[0].function.parameters`."""

    name: str
    parameters: dict[str, Any] | None
    strict: bool
    param: str


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
    return f"{START}answer: {json_rule(_ANY_OBJECT)}\n"


def json_schema(schema: dict[str, Any], *, strict: bool | None, param: str) -> str:
    """JSON that fits `schema`, properties in the schema's order; enforced whether `strict` or not.

    With `strict`, keywords that no specification knows are refused; else they are annotations, as JSON Schema says.

    Raises:
        InvalidRequest, UnsupportedParameter: they name `param` and the place in the schema.
    """
    return f"{START}answer: {json_rule(_enforceable(_text_of(schema, param), bool(strict), param))}\n"


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
    calls = json_rule(_calls(_texts_of(functions), required, name_key, arguments_key))
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


def arguments_rules(functions: Sequence[Function], *, required: bool) -> dict[str, str]:
    """What the arguments of each function must look like, by its name, for formats whose calls are not JSON as a whole.

    With `required` as in `tool_calls`, which also says what is raised.
    """
    calls = _calls(_texts_of(functions), required, "name", "arguments")
    rules = {}
    for index, (function, call) in enumerate(zip(functions, calls["anyOf"], strict=True)):
        own = {name: schema for name, schema in calls.get("$defs", {}).items() if name.startswith(f"{index}-")}
        arguments = call["properties"]["arguments"]
        rules[function.name] = json_rule(arguments | {"$defs": own} if own else arguments)
    return rules


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


# -- schemas ---------------------------------------------------------------------------------------------------------


def _texts_of(functions: Sequence[Function]) -> tuple[tuple[str, str, bool, str], ...]:
    """The functions as `_calls` takes them: (name, schema as JSON, strict, param)."""
    texts = tuple(
        (function.name, _text_of(function.parameters, function.param), function.strict, function.param)
        for function in functions
    )
    if sum(len(text) for _, text, _, _ in texts) > MAX_TOOLS_BYTES:
        raise InvalidRequest(f"The functions' schemas are larger than {MAX_TOOLS_BYTES} bytes together.", param="tools")
    return texts


def _text_of(schema: dict[str, Any] | None, param: str) -> str:
    """The schema as JSON, which is its key in the caches."""
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequest("The schema is nested too deeply.", param=param) from None
    if (size := len(text.encode())) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"The schema has {size} bytes, and at most {MAX_SCHEMA_BYTES} are taken.", param=param, code="invalid_value"
        )
    return text


@lru_cache(maxsize=64)
def _enforceable(text: str, strict: bool, param: str) -> dict[str, Any]:
    schemas = Schemas()
    try:
        schema = schemas.add(json.loads(text), strict=strict)
        check(schema, schemas)
    except SchemaError as error:
        raise _refusal(error, param) from None
    return schema | _definitions(schemas)


@lru_cache(maxsize=64)
def _calls(
    functions: tuple[tuple[str, str, bool, str], ...], required: bool, name_key: str, arguments_key: str
) -> dict[str, Any]:
    """A schema of a call of one of the functions, an option for each in their order."""
    together = Schemas()
    calls = []
    for index, (name, text, strict, param) in enumerate(functions):
        arguments = _ANY_OBJECT
        if strict or required:
            own = Schemas(f"{index}-", together.budget)
            try:
                arguments = _arguments(json.loads(text), strict, own)
            except SchemaError as error:
                raise _refusal(error, param) from None
            together.definitions |= own.definitions
        properties = {name_key: {"const": name}, arguments_key: arguments}
        call = {"type": "object", "properties": properties, "required": [name_key, arguments_key]}
        calls.append(call | {"additionalProperties": False})
    schema: dict[str, Any] = {"anyOf": calls}
    try:
        check(schema, together)
    except SchemaError as error:
        raise InvalidRequest(f"The functions cannot be enforced together: {error.message}.", param="tools") from None
    return schema | _definitions(together)


def _arguments(parameters: dict[str, Any] | None, strict: bool, schemas: Schemas) -> dict[str, Any]:
    """The schema of a function's arguments."""
    if not parameters:
        return _NO_ARGUMENTS
    try:
        arguments = schemas.add(parameters, strict=strict, lenient=not strict)
        check(arguments, schemas)
    except (UnsupportedKeyword, SchemaTooLarge):
        if strict:
            raise
        return _ANY_OBJECT
    return arguments if arguments.get("type") == "object" else {"allOf": [_ANY_OBJECT, arguments]}


def _definitions(schemas: Schemas) -> dict[str, Any]:
    return {"$defs": schemas.definitions} if schemas.definitions else {}


def _refusal(error: SchemaError, param: str) -> InvalidRequest:
    """OpenAI's error object has one `param`, the field; the message has the place within it."""
    place = error.place if len(error.place) <= 200 else f"{error.place[:100]}…{error.place[-100:]}"
    if isinstance(error, UnsupportedKeyword):
        return UnsupportedParameter(f"Unsupported schema at {place}: {error.message}.", param=param)
    return InvalidRequest(f"Invalid schema at {place}: {error.message}.", param=param, code="invalid_value")
