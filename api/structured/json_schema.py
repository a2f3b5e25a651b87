"""A client's JSON Schema, brought into the few keywords that llguidance enforces exactly.

`Schemas.add` leaves annotations out, resolves and renames references, writes oneOf as anyOf where that is the same,
and bounds what would take long to compile. A keyword that cannot be enforced is refused with its place
(`$.properties.a.not`), never dropped in silence. It knows neither HTTP nor llguidance; called by `grammar`.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

from api.structured.schema_cost import Budget, SchemaError, UnsupportedKeyword, values_within
from api.structured.schema_overlap import are_disjoint

MAX_EXACT = 2**53  # llguidance holds numbers as doubles

FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
_TYPES = frozenset("null boolean integer number string array object".split())
_COUNTS = frozenset("minItems maxItems minLength maxLength minProperties maxProperties".split())
_NUMBERS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum".split())
# Say nothing about what is valid. Definitions are read where a $ref names them.
_ANNOTATIONS = frozenset(
    "$schema $id id $anchor $dynamicAnchor $recursiveAnchor $vocabulary $comment $defs definitions title description "
    "default deprecated readOnly writeOnly examples example externalDocs xml discriminator contentEncoding "
    "contentMediaType contentSchema".split()
)
# Keywords of JSON Schema, or of OpenAPI, that decide what is valid and are not enforced here.
_UNSUPPORTED = frozenset(
    "not if then else contains minContains maxContains uniqueItems propertyNames dependencies dependentRequired "
    "dependentSchemas unevaluatedItems unevaluatedProperties $dynamicRef $recursiveRef nullable".split()
)
# What generators write out although it says nothing.
_SAYS_NOTHING: dict[str, Any] = {
    "uniqueItems": False,
    "nullable": False,
    "unevaluatedItems": True,
    "unevaluatedProperties": True,
    "propertyNames": {"type": "string"},
}
_PLAIN_NAME = re.compile(r"[A-Za-z_$][\w$-]*")


class Schemas:
    """The definitions of schemas, under names of our own that begin with `prefix`."""

    def __init__(self, prefix: str = "", budget: Budget | None = None) -> None:
        self.prefix = prefix
        self.budget = budget or Budget()
        self.definitions: dict[str, Any] = {}
        self.places: dict[int, str] = {}  # of what `add` made, by id: where it is in the client's schema

    def add(self, schema: dict[str, Any], *, strict: bool = False, lenient: bool = False) -> dict[str, Any]:
        """The schema with references into `definitions`.

        Args:
            strict: keywords that no specification knows are refused; otherwise they are annotations, as the
                specification says.
            lenient: what cannot be enforced is left out instead of being refused.

        Raises:
            SchemaError: it is no valid schema, or too large.
            UnsupportedKeyword: it cannot be enforced.
        """
        return _Reader(self, schema, strict, lenient).read()


class _Reader:
    """Reads one schema. Recursive, as deep as its budget allows."""

    def __init__(self, schemas: Schemas, root: dict[str, Any], strict: bool, lenient: bool) -> None:
        self._schemas = schemas
        self._budget = schemas.budget
        self._root = root
        self._strict = strict
        self._lenient = lenient
        self._names: dict[str, str] = {}  # of definitions, by the pointer to them
        self._one_ofs: list[tuple[list[Any], str]] = []
        self._depth = 0

    def read(self) -> dict[str, Any]:
        schema = self._schema(self._root, "$")
        self._check_aliases()
        for options, place in self._one_ofs:  # only now are all definitions there to look into
            if not self._lenient and not are_disjoint(options, self._schemas.definitions):
                raise UnsupportedKeyword(
                    "oneOf is supported where no value can fit two of its options: options of different types, or "
                    "objects that differ in a required property's const or enum; use anyOf otherwise",
                    place,
                )
        return schema

    def _schema(self, schema: Any, place: str) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError("a schema is an object or a boolean", place)
        self._depth += 1
        self._budget.add_schema(schema, place, self._depth)
        made: dict[str, Any] = {}
        self._schemas.places[id(made)] = place
        for keyword, value in schema.items():
            at = place + _step(keyword)
            try:
                self._keyword(made, schema, keyword, value, at)
            except UnsupportedKeyword:
                if not self._lenient:
                    raise
        self._depth -= 1
        self._budget.add_made(made, place)
        return made

    def _keyword(self, made: dict[str, Any], schema: dict[str, Any], keyword: str, value: Any, at: str) -> None:
        match keyword:
            case "$ref":
                made[keyword] = self._reference(value, at)
            case "properties" | "patternProperties":
                made[keyword] = self._members(keyword, value, at)
            case "prefixItems" | "anyOf":
                made[keyword] = self._list(value, at)
            case "allOf":
                made.setdefault("allOf", []).extend(self._list(value, at))
            case "oneOf":
                options = self._list(value, at)
                self._one_ofs.append((options, at))
                made.setdefault("allOf", []).append({"anyOf": options})
            case "items" if isinstance(value, list):  # until draft 2019-09
                made["prefixItems"] = self._list(value, at)
                if "additionalItems" in schema:
                    made["items"] = self._schema(schema["additionalItems"], f"{at[: -len('items')]}additionalItems")
            case "items" | "additionalProperties":
                made[keyword] = self._schema(value, at)
            case "additionalItems":
                pass  # read with a list of items; without one it says nothing
            case "const":
                made[keyword] = self._exactly(value, at)
            case "enum":
                made[keyword] = self._exactly(_is_list(value, at), at)
            case "format":
                if _text(value, at) in FORMATS:
                    made[keyword] = value
                elif _allows_strings(schema):  # of numbers it is an annotation
                    raise UnsupportedKeyword(f"format is one of {', '.join(sorted(FORMATS))}, not {value!r}", at)
            case "multipleOf":
                made[keyword] = self._multiple(value, at)
            case _ if keyword in _UNSUPPORTED:
                if keyword not in _SAYS_NOTHING or _SAYS_NOTHING[keyword] != value:
                    raise UnsupportedKeyword(f"the keyword '{keyword}' is not supported", at)
            case _ if keyword in _ANNOTATIONS or keyword.startswith("x-"):
                pass
            case _ if keyword in _CHECKS:
                made[keyword] = _CHECKS[keyword](value, at)
            case _ if self._strict:
                raise UnsupportedKeyword(f"the keyword '{keyword}' is not known", at)

    def _list(self, value: Any, at: str) -> list[Any]:
        return [self._schema(member, f"{at}[{index}]") for index, member in enumerate(_is_list(value, at))]

    def _members(self, keyword: str, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise SchemaError(f"'{keyword}' is an object", at)
        if keyword == "patternProperties":
            self._budget.add_pattern_properties(len(value), at)
        return {name: self._schema(member, at + _step(name)) for name, member in value.items()}

    def _exactly(self, value: Any, at: str) -> Any:
        """A value that is to be matched, or several."""
        self._budget.add_value(value, at)
        for member in values_within(value, at):
            if _is_number(member):
                _bound(member, at)
        return value

    def _multiple(self, value: Any, at: str) -> Any:
        if not _is_number(value) or value <= 0:
            raise SchemaError("'multipleOf' is a number above 0", at)
        self._budget.add_multiple(value, at)
        return value

    def _reference(self, value: Any, at: str) -> str:
        if not isinstance(value, str):
            raise SchemaError("'$ref' is a string", at)
        pointer = unquote(value[1:])
        if not value.startswith("#") or (pointer and not pointer.startswith("/")):
            raise UnsupportedKeyword(f"'$ref' names a place in the schema itself, as #/$defs/NAME; not {value!r}", at)
        if pointer not in self._names:
            self._names[pointer] = name = f"{self._schemas.prefix}{len(self._schemas.definitions)}"
            self._schemas.definitions[name] = True  # its place, while it is being read
            target, place = self._resolve(pointer, value, at)
            self._schemas.definitions[name] = self._schema(target, place)
        return f"#/$defs/{self._names[pointer]}"

    def _resolve(self, pointer: str, reference: str, at: str) -> tuple[Any, str]:
        target, place = self._root, "$"
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and part in target:
                target, place = target[part], place + _step(part)
            elif isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target, place = target[int(part)], f"{place}[{part}]"
            else:
                raise SchemaError(f"{reference!r} names no place in the schema", at)
        return target, place

    def _check_aliases(self) -> None:
        """A reference that leads back to itself, and to nothing else, allows no value at all."""
        definitions = self._schemas.definitions
        for schema in definitions.values():
            names: set[str] = set()
            target = schema
            while isinstance(target, dict) and "$ref" in target:
                name = target["$ref"].removeprefix("#/$defs/")
                if name in names:
                    raise SchemaError("the '$ref' leads back to itself", self._schemas.places[id(schema)])
                names.add(name)
                target = definitions[name]


def _type(value: Any, at: str) -> Any:
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or name not in _TYPES:
            raise SchemaError(f"'type' is one of {', '.join(sorted(_TYPES))}, or a list of them", at)
    return value


def _count(value: Any, at: str) -> int:
    if not _is_number(value) or value < 0 or value != int(value):
        raise SchemaError("this is an integer from 0 on", at)
    if value > MAX_EXACT:
        raise UnsupportedKeyword("numbers beyond 2^53 cannot be counted", at)
    return int(value)


def _bound(value: Any, at: str) -> Any:
    if isinstance(value, bool):  # exclusiveMinimum and exclusiveMaximum in draft 4
        return value
    if not _is_number(value):
        raise SchemaError("this is a number", at)
    if abs(value) > MAX_EXACT:
        raise UnsupportedKeyword("numbers beyond 2^53 cannot be enforced exactly", at)
    return value


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise SchemaError("this is a string", at)
    return value


def _names(value: Any, at: str) -> list[str]:
    return [_text(name, at) for name in _is_list(value, at)]


_CHECKS = {"type": _type, "pattern": _text, "required": _names}
_CHECKS |= dict.fromkeys(_COUNTS, _count) | dict.fromkeys(_NUMBERS, _bound)


def _is_list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise SchemaError("this is a list", at)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _allows_strings(schema: dict[str, Any]) -> bool:
    types = schema.get("type", "string")
    return types == "string" or (isinstance(types, list) and "string" in types)


def _step(name: str) -> str:
    return f".{name}" if _PLAIN_NAME.fullmatch(name) else f"[{json.dumps(name, ensure_ascii=False)}]"
