"""Whether two JSON Schemas can fit the same value, as far as types, constants and required properties tell.

oneOf is anyOf where its options exclude each other. Pure; called by `json_schema` with the schemas it has made,
whose references are `#/$defs/NAME`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

MAX_OPTIONS = 100  # each is compared with each
_MAX_DEPTH = 8

_ALL_TYPES = frozenset("null boolean number string array object".split())


def are_disjoint(options: Sequence[Any], definitions: Mapping[str, Any]) -> bool:
    """True if surely no value fits two of the options."""
    if len(options) > MAX_OPTIONS:
        return False
    return all(_exclude(a, b, definitions, 0) for a, b in itertools.combinations(options, 2))


def _exclude(a: Any, b: Any, definitions: Mapping[str, Any], depth: int) -> bool:
    if depth > _MAX_DEPTH:
        return False
    a, b = _resolved(a, definitions), _resolved(b, definitions)
    if not (_types(a) & _types(b)):
        return True
    values = _values(a), _values(b)
    if values[0] is not None and values[1] is not None:
        return values[0].isdisjoint(values[1])
    if _types(a) == _types(b) == {"object"}:
        shared = set(a.get("required", ())) & set(b.get("required", ()))
        of_a, of_b = a.get("properties", {}), b.get("properties", {})
        return any(
            _exclude(of_a[name], of_b[name], definitions, depth + 1) for name in shared if name in of_a and name in of_b
        )
    return False


def _resolved(schema: Any, definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that a reference stands for; what stands beside the reference only narrows it."""
    for _ in range(_MAX_DEPTH):
        if isinstance(schema, dict) and "$ref" in schema:
            schema = definitions[schema["$ref"].removeprefix("#/$defs/")]
    return schema if isinstance(schema, dict) else {}


def _types(schema: dict[str, Any]) -> frozenset[str]:
    if (values := schema.get("enum", [schema["const"]] if "const" in schema else None)) is not None:
        return frozenset(_type_of(value) for value in values)
    types = schema.get("type", _ALL_TYPES)
    names = [types] if isinstance(types, str) else types
    return frozenset("number" if name == "integer" else name for name in names)


def _values(schema: dict[str, Any]) -> frozenset[str] | None:
    """What const or enum allow, in a form that compares as JSON does (1 is 1.0, and true is not 1)."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return None if values is None else frozenset(json.dumps(_canonical(value), sort_keys=True) for value in values)


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _canonical(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_canonical(member) for member in value]
    return value


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "number")
