"""From a JSON object to a request: pydantic's findings in OpenAI's words, with OpenAI's path of the field.

Unknown fields follow UNKNOWN_FIELDS: refused by name, or taken out and reported to the caller. It judges only what the
schema says; whether the model and its limits allow a request is the routes' to see.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from api.body import parse_json_object
from api.errors import ApiError, InvalidRequest, UnknownParameter, UnsupportedParameter
from api.known_fields import likely_meant

Schema = TypeVar("Schema", bound=BaseModel)
Path = tuple[str | int, ...]

LARGE_BODY_BYTES = 64 * 1024
MAX_IGNORED_FIELDS = 100

_TYPE_NAMES = {
    str: "a string", bool: "a boolean", int: "an integer", float: "a decimal", list: "an array", dict: "an object",
    type(None): "null",
}  # fmt: skip
_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "content_type": "a string or an array of content parts",
    "stop_type": "a string or an array of strings",
    "prompt_type": "a string, or an array of strings, of token ids, or of arrays of token ids",
}
# Types of content parts and blocks, OpenAI's and Anthropic's.
_NOT_TEXT = frozenset("image_url input_audio file input_image input_file image document".split())
_TOOL_TYPE = re.compile(r"tools\[\d+\]\.type")
_BOUNDS = {
    "greater_than_equal": ("below_min_value", "below minimum value. Expected a value >=", "ge"),
    "greater_than": ("below_min_value", "below minimum value. Expected a value >", "gt"),
    "less_than_equal": ("above_max_value", "above maximum value. Expected a value <=", "le"),
    "less_than": ("above_max_value", "above maximum value. Expected a value <", "lt"),
}


async def parse_request(
    schema: type[Schema], body: bytes, unknown_fields: Literal["reject", "warn"]
) -> tuple[Schema, list[str]]:
    """`validate` for a body as it came; a large one does not hold up the event loop. Raises InvalidRequest too."""

    def parse() -> tuple[Schema, list[str]]:
        return validate(schema, parse_json_object(body), unknown_fields)

    return parse() if len(body) < LARGE_BODY_BYTES else await asyncio.to_thread(parse)


def validate(
    schema: type[Schema],
    body: dict[str, Any],
    unknown_fields: Literal["reject", "warn"],
    *,
    setting_decides: bool = True,
) -> tuple[Schema, list[str]]:
    """The request, and the names of fields that were ignored (only where unknown fields are not refused).

    `setting_decides`: `unknown_fields` is what the server's setting says, which a refusal may name.

    Raises InvalidRequest, UnknownParameter or UnsupportedParameter for the first thing that is wrong.
    """
    ignored: list[str] = []
    while True:
        try:
            return schema.model_validate(body), ignored
        except ValidationError as error:
            findings = error.errors(include_url=False)
        unknown = [finding for finding in findings if finding["type"] == "extra_forbidden"]
        others = [finding for finding in findings if finding["type"] != "extra_forbidden"]
        if unknown_fields == "warn" and 0 < len(unknown) <= MAX_IGNORED_FIELDS - len(ignored):
            paths = [_path(body, finding["loc"]) for finding in unknown]
            ignored += [_dotted(path) for path in paths]
            for path in paths:
                body = _without(body, path)
        elif others:
            raise _as_api_error(body, others[0])
        else:
            may_pass = setting_decides and unknown_fields == "reject"
            raise _unknown(schema, _path(body, unknown[0]["loc"]), may_pass=may_pass)


def _unknown(schema: type[BaseModel], path: Path, *, may_pass: bool) -> UnknownParameter:
    """`may_pass`: whether another setting of the server would let it pass."""
    message = f"Unknown parameter: '{_dotted(path)}'."
    if meant := likely_meant(schema, path):
        message += f" Did you mean '{_dotted((*path[:-1], meant))}'?"
    if may_pass:
        message += " With the server's setting UNKNOWN_FIELDS=warn it would be left out instead of refused."
    return UnknownParameter(message, param=_dotted(path))


def _as_api_error(body: dict[str, Any], finding: ErrorDetails) -> ApiError:
    """One of pydantic's findings, said as OpenAI says it."""
    kind, value, context = finding["type"], finding["input"], finding.get("ctx", {})
    path = _path(body, finding["loc"], lacking=value if kind == "missing" else None)
    name = _dotted(path)
    if kind == "missing" or (kind == "union_tag_not_found" and isinstance(value, dict)):
        name = name if kind == "missing" else _dotted((*path, _tag_field(context)))
        return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if kind == "unsupported":
        *most, last = [json.dumps(accepted) for accepted in context["accepted"]]
        accepted = f"{', '.join(most)} or {last}" if most else last
        return UnsupportedParameter(
            f"Unsupported parameter: '{name}' is not supported by this server with the value you gave; "
            f"leave it out, or send {accepted}.",
            param=name,
        )
    if kind == "conflict":
        return InvalidRequest(finding["msg"], param=context["param"], code="invalid_value")
    if kind == "union_tag_invalid":
        field = _tag_field(context)
        return _invalid_value(_dotted((*path, field)), value[field], str(context["expected_tags"]))
    if kind == "literal_error":
        return _invalid_value(name, value, str(context["expected"]))
    if kind in _EXPECTED or kind == "union_tag_not_found":
        expected, got = _EXPECTED.get(kind, "an object"), _TYPE_NAMES.get(type(value), "another type")
        message = f"Invalid type for '{name}': expected {expected}, but got {got} instead."
        return InvalidRequest(message, param=name, code="invalid_type")
    if kind in _BOUNDS:
        code, words, bound = _BOUNDS[kind]
        # A query's value is text: there the bound alone says of what kind the field is.
        number = "decimal" if isinstance(value, float) or isinstance(context[bound], float) else "integer"
        message = f"Invalid '{name}': {number} {words} {context[bound]}, but got {_short(value)} instead."
        return InvalidRequest(message, param=name, code=f"{number}_{code}")
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        return _wrong_length(name, kind, value, context)
    return InvalidRequest(f"Invalid '{name}': {finding['msg']}.", param=name or None, code="invalid_value")


def _invalid_value(name: str, value: Any, expected: str) -> InvalidRequest:
    """For one that is not among the `expected` words."""
    if not isinstance(value, str):
        got = _TYPE_NAMES.get(type(value), "another type")
        message = f"Invalid type for '{name}': expected one of {expected}, but got {got} instead."
        return InvalidRequest(message, param=name, code="invalid_type")
    message = f"Invalid value for '{name}': {_short(value)}. Supported values are: {expected}."
    if value in _NOT_TEXT:
        message += " The served model reads text only."
    if _TOOL_TYPE.fullmatch(name):  # the user of an agent reads it, who did not write the request
        message += " Other tools have to be switched off in the client."
    return InvalidRequest(message, param=name, code="invalid_value")


def _wrong_length(name: str, kind: str, value: Any, context: Mapping[str, Any]) -> InvalidRequest:
    noun = _TYPE_NAMES.get(type(value), "an array").split()[1]
    if not value:
        message = f"Invalid '{name}': empty {noun}. Expected a minimum length of 1."
        return InvalidRequest(message, param=name, code=f"empty_{noun}")
    side, bound = ("maximum", context["max_length"]) if kind.endswith("long") else ("minimum", context["min_length"])
    code = f"{noun}_above_max_length" if side == "maximum" else f"{noun}_below_min_length"
    message = f"Invalid '{name}': expected a {side} length of {bound}, but got a length of {len(value)} instead."
    return InvalidRequest(message, param=name, code=code)


def _tag_field(context: Mapping[str, Any]) -> str:
    return str(context.get("discriminator", "type")).strip("'")


def _short(value: Any) -> str:
    if isinstance(value, list | dict):  # may be as deep as a body may be
        return _TYPE_NAMES[type(value)]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _path(body: Any, location: Sequence[str | int], *, lacking: Any = None) -> Path:
    """pydantic's location without the names of union members it puts between: only what is there in the body, and at
    its end what should be and is missing. `lacking`: the object that it is missing from."""
    path: list[str | int] = []
    value, missing = body, lacking is not None
    for place, step in enumerate(location):
        last = place == len(location) - 1
        if missing and value is lacking:  # whatever its fields are called, the steps up to the last are union members
            path.append(location[-1])
            break
        if isinstance(step, int) and isinstance(value, list):
            path.append(step)
            value = value[step] if step < len(value) else None
        elif isinstance(step, str) and isinstance(value, dict) and (step in value or (missing and last)):
            following, child = None if last else location[place + 1], value.get(step)
            names_member = following in value and not (isinstance(child, dict) and following in child)
            if names_member and not (missing and place == len(location) - 2):
                continue  # a union's member that is called as one of its fields is: {"type": "text", "text": …}
            path.append(step)
            value = child
    return tuple(path)


def _dotted(path: Path) -> str:
    """messages[0].content, as OpenAI writes it."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _without(value: Any, path: Path) -> Any:
    """A copy of `value` that lacks the member at `path`."""
    step, *rest = path
    copy = value.copy()
    if rest:
        copy[step] = _without(value[step], tuple(rest))
    else:
        del copy[step]
    return copy
