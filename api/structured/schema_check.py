"""Whether llguidance can enforce a schema that `json_schema` made: it is compiled, within limits, and looked into.

The vocabulary is a stand-in of 256 bytes, so no model is needed and what the last rank will compile is what was
compiled here. llguidance does not say where in a schema it failed; that is found by compiling its parts.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from api.structured.json_schema import Schemas
from api.structured.schema_cost import SchemaError, SchemaTooLarge, UnsupportedKeyword

LOCATE_S = 1.0  # how long the place is looked for
_MESSAGE_LENGTH = 300
# A text that only one way leads through is not forced on the model token by token: that takes time by its length.
HEAD = '%llguidance {"no_forcing": true}\n'
# One line, with one space after ',' and ':' or none: a weak model could write white space for ever.
_LAYOUT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}}
_LIMITS = LLParserLimits(initial_lexer_fuel=500_000, max_grammar_size=250_000, verbose_errors=False)
# What llguidance says around the message: where in the grammar, the grammar itself, and names of our definitions.
_WRAPPING = re.compile(
    r"^at \d+\(\d+\): failed to compile JSON schema: |"
    r"(: json-schema:|while processing|\n +\d+ \| |<non-verbose/>)(?s:.*)"
)
# llguidance's words for a schema that nothing can fit.
_FITS_NOTHING = ("Unsatisfiable", "NoExtension")


def check(schema: dict[str, Any], schemas: Schemas) -> None:
    """Raises UnsupportedKeyword, or SchemaError where no JSON fits; with the place, as near as it is found."""
    error = _error(schema, schemas)
    if not error:
        return
    place = _locate(schema, "$", schemas, time.monotonic() + LOCATE_S, set())
    if "recursion limit" in error:
        raise SchemaTooLarge("the schema is nested too deeply", place)
    if any(word in error for word in _FITS_NOTHING):
        raise SchemaError(f"no JSON fits this: {error}", place)
    raise UnsupportedKeyword(error, place)


def _error(schema: Any, schemas: Schemas) -> str:
    """What llguidance says against it, "" where nothing."""
    if not isinstance(schema, dict):
        return ""
    grammar = f"{HEAD}start: {json_rule(schema | {'$defs': schemas.definitions})}"
    matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    message = _WRAPPING.sub("", matcher.get_error())
    return " ".join(message.split())[:_MESSAGE_LENGTH]


def json_rule(schema: dict[str, Any]) -> str:
    """What stands in a rule of a grammar for JSON that fits the schema."""
    return "%json " + json.dumps(schema | _LAYOUT, ensure_ascii=False, separators=(",", ":"))


@cache
def _bytes() -> LLTokenizer:
    return LLTokenizer("byte")


def _locate(schema: dict[str, Any], around: str, schemas: Schemas, deadline: float, seen: set[int]) -> str:
    """The place of the innermost part that fails by itself; parts that we put in have that of what is around them."""
    place = schemas.places.get(id(schema), around)
    seen.add(id(schema))
    for part in _parts(schema, schemas):
        if time.monotonic() > deadline:
            break
        if id(part) not in seen and _error(part, schemas):
            return _locate(part, place, schemas, deadline, seen)
    for keyword in ("pattern", "patternProperties"):  # the keywords that hold a language of their own
        rest = {other: value for other, value in schema.items() if other != keyword}
        if keyword in schema and not _error(rest, schemas):
            return f"{place}.{keyword}"
    return place


def _parts(schema: dict[str, Any], schemas: Schemas) -> Iterator[Any]:
    for keyword, value in schema.items():
        match keyword:
            case "$ref":
                yield schemas.definitions[value.removeprefix("#/$defs/")]
            case "properties" | "patternProperties":
                yield from value.values()
            case "allOf" | "anyOf" | "prefixItems":
                yield from value
            case "items" | "additionalProperties":
                yield value
