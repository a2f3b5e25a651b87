"""The schemas of a request, of its answer and of its functions, as far as a grammar can enforce them.

What cannot be enforced is an error that names the schema's field and the place in it. Results are kept: agents send the
same schemas with every request. Called by `api.structured.grammar` and `api.structured.harmony`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from api.errors import InvalidRequest, UnsupportedParameter
from api.structured.json_schema import Schemas
from api.structured.schema_check import check, json_rule
from api.structured.schema_cost import SchemaError, SchemaTooLarge, UnsupportedKeyword

MAX_SCHEMA_BYTES = 256 * 1024  # of one schema, as JSON
MAX_TOOLS_BYTES = 1024 * 1024  # of all functions' schemas together

ANY_OBJECT: dict[str, Any] = {"type": "object"}
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Function:
    """A tool as the request gives it; `param` names its schema's field: `tools[0].function.parameters`."""

    name: str
    parameters: dict[str, Any] | None
    strict: bool
    param: str


def content_schema(schema: dict[str, Any], *, strict: bool, param: str) -> dict[str, Any]:
    """What JSON must be that fits `schema`. With `strict`, keywords that no specification knows are refused.

    Raises:
        InvalidRequest, UnsupportedParameter: they name `param` and the place in the schema.
    """
    return _enforceable(_text_of(schema, param), strict, param)


def call_schema(
    functions: Sequence[Function], *, required: bool, name_key: str = "name", arguments_key: str = "arguments"
) -> dict[str, Any]:
    """What a call of one of the functions must be, `anyOf` with an option for each in their order.

    The schemas of strict functions are enforced; those of others only where a call is `required`, and then without what
    cannot be enforced, as a schema that is not strict is no promise.

    Raises:
        InvalidRequest, UnsupportedParameter: they name the function's `param` and the place in the schema.
    """
    texts = tuple(
        (function.name, _text_of(function.parameters, function.param), function.strict, function.param)
        for function in functions
    )
    if sum(len(text) for _, text, _, _ in texts) > MAX_TOOLS_BYTES:
        message = f"The functions' schemas are larger than {MAX_TOOLS_BYTES} bytes together."
        raise InvalidRequest(message, param="tools", code="invalid_value")
    return _calls(texts, required, name_key, arguments_key)


def arguments_rules(functions: Sequence[Function], *, required: bool) -> dict[str, str]:
    """What the arguments of each function must look like, by its name, for formats whose calls are not JSON as a whole.

    The rest is as in `call_schema`.
    """
    calls = call_schema(functions, required=required)
    rules = {}
    for index, (function, call) in enumerate(zip(functions, calls["anyOf"], strict=True)):
        own = {name: schema for name, schema in calls.get("$defs", {}).items() if name.startswith(f"{index}-")}
        arguments = call["properties"]["arguments"]
        rules[function.name] = json_rule(arguments | {"$defs": own} if own else arguments)
    return rules


def _text_of(schema: dict[str, Any] | None, param: str) -> str:
    """The schema as JSON, which is its key in the caches."""
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequest("The schema is nested too deeply.", param=param, code="invalid_value") from None
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
        arguments = ANY_OBJECT
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
        message = f"The functions cannot be enforced together: {error.message}."
        raise InvalidRequest(message, param="tools", code="invalid_value") from None
    return schema | _definitions(together)


def _arguments(parameters: dict[str, Any] | None, strict: bool, schemas: Schemas) -> dict[str, Any]:
    """The schema of a function's arguments."""
    if not parameters:
        return _NO_ARGUMENTS
    try:
        arguments = schemas.add(parameters, strict=strict, lenient=not strict)
        check(arguments, schemas)
        if arguments.get("type") != "object":
            arguments = _only_objects(arguments, schemas)
    except (UnsupportedKeyword, SchemaTooLarge):
        if strict:
            raise
        return ANY_OBJECT
    return arguments


def _only_objects(arguments: dict[str, Any], schemas: Schemas) -> dict[str, Any]:
    """Of what fits the schema, the objects. Raises as `check` does, and SchemaError where there are none."""
    objects = {"allOf": [ANY_OBJECT, arguments]}
    try:
        check(objects, schemas)
    except (UnsupportedKeyword, SchemaTooLarge):
        raise
    except SchemaError as error:
        message = "the arguments of a function are an object, and no object fits this"
        raise SchemaError(message, error.place) from None
    return objects


def _definitions(schemas: Schemas) -> dict[str, Any]:
    return {"$defs": schemas.definitions} if schemas.definitions else {}


def _refusal(error: SchemaError, param: str) -> InvalidRequest:
    """OpenAI's error object has one `param`, the field; the message has the place within it."""
    place = error.place if len(error.place) <= 200 else f"{error.place[:100]}…{error.place[-100:]}"
    if isinstance(error, UnsupportedKeyword):
        return UnsupportedParameter(f"Unsupported schema at {place}: {error.message}.", param=param)
    return InvalidRequest(f"Invalid schema at {place}: {error.message}.", param=param, code="invalid_value")
