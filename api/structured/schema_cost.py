"""What compiling a JSON Schema, and following it, will take: bounded before llguidance begins, which cannot be stopped.

Its own limits bound memory and most of the time; these are for what they do not see. A unit is a plain schema of one
type, and all units together are some hundred milliseconds, once. Pure; used by `json_schema`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

MAX_COST = 10_000  # of all schemas of a request
MAX_DEPTH = 128  # schemas within schemas, references followed: llguidance recurses as deep, on the thread's stack
MAX_VALUE_DEPTH = 32
MAX_PATTERN_PROPERTIES = 32  # each is compared with each
MAX_PATTERNS = 10  # where schemas are intersected: regular expressions that hold at once take exponential time

_BOUNDS = frozenset(
    "minItems maxItems minLength maxLength minProperties maxProperties minimum maximum exclusiveMinimum "
    "exclusiveMaximum pattern".split()
)
_APPLIED = frozenset(["$ref", "anyOf", "const", "enum"])


class SchemaError(Exception):
    """The schema is wrong; `place` says where."""

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.message = message
        self.place = place


class UnsupportedKeyword(SchemaError):
    """The schema may be right, but this in it cannot be enforced."""


class SchemaTooLarge(SchemaError):
    """It would take too much time or memory."""


class Budget:
    """Of all schemas that become one. Its methods raise SchemaTooLarge, or UnsupportedKeyword where that tells more."""

    def __init__(self) -> None:
        self._spent = 0
        self._multiple = 1
        self._num_pattern_properties = 0
        self._num_patterns = 0
        self._num_intersections = 0

    def add_schema(self, schema: dict[str, Any], place: str, depth: int) -> None:
        """A client's schema, without those within it."""
        if depth > MAX_DEPTH:
            raise SchemaTooLarge(f"the schema is nested more than {MAX_DEPTH} deep, references followed", place)
        required, properties = schema.get("required"), schema.get("properties")
        num_required = len(required) if isinstance(required, list) else 0
        num_optional = max(0, len(properties) - num_required) if isinstance(properties, dict) else 0
        # Each optional property may follow on each; where they are counted, each is written out with each.
        pairs = num_optional**2 // (1 if {"minProperties", "maxProperties"} & schema.keys() else 50)
        bounds = len(_BOUNDS & schema.keys()) + 2 * len({"minItems", "maxItems"} & schema.keys())
        # Without a type it is compiled for each of them.
        self._spend(1 + (bounds if "type" in schema else 6 * bounds) + num_required + pairs, place)

    def add_made(self, made: dict[str, Any], place: str) -> None:
        """The same schema as it will be compiled."""
        others = bool(made.keys() - _APPLIED - {"allOf", "type"})
        num_applied = len(_APPLIED & made.keys()) + len(made.get("allOf", ()))
        self._num_intersections += max(0, num_applied + others - 1)
        self._num_patterns += "pattern" in made
        if self._num_intersections and self._num_patterns > MAX_PATTERNS:
            raise SchemaTooLarge(
                f"beside allOf, and keywords beside $ref, anyOf or enum, at most {MAX_PATTERNS} patterns are supported",
                place,
            )

    def add_pattern_properties(self, count: int, place: str) -> None:
        self._num_pattern_properties += count
        if self._num_pattern_properties > MAX_PATTERN_PROPERTIES:
            raise UnsupportedKeyword(f"there are more than {MAX_PATTERN_PROPERTIES} patternProperties", place)

    def add_multiple(self, multiple: float, place: str) -> None:
        """A multipleOf: a state for each remainder of its digits. allOf may ask for several at once."""
        digits = Fraction(str(multiple)).numerator
        while digits % 10 == 0:
            digits //= 10
        together = math.lcm(self._multiple, digits)
        if together > MAX_COST:
            raise UnsupportedKeyword("'multipleOf' has too many digits, alone or together with others", place)
        self._multiple = together
        self._spend(10 + together // 10, place)

    def add_value(self, value: Any, place: str) -> None:
        """What a const or an enum allows."""
        self._spend(sum(isinstance(member, dict) for member in values_within(value, place)), place)

    def _spend(self, cost: int, place: str) -> None:
        self._spent += cost
        if self._spent > MAX_COST:
            raise SchemaTooLarge("the schema is too large: too many schemas, or optional properties of one", place)


def values_within(value: Any, place: str) -> Iterator[Any]:
    """The value and all within it. Not recursive."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_VALUE_DEPTH:
            raise SchemaTooLarge(f"the value is nested more than {MAX_VALUE_DEPTH} deep", place)
        yield from level
        level = [
            member
            for outer in level
            if isinstance(outer, dict | list)
            for member in (outer.values() if isinstance(outer, dict) else outer)
        ]
