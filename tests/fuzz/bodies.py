"""Request bodies that Hypothesis makes from a JSON schema of the OpenAPI description: right ones, and wrong in any way.

At every place of a body there is a small chance for something that does not belong there. Limits of tokens are made
small, so that an answer is a few steps; everything else may be as extreme as JSON allows. Used by the fuzzer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

MAX_TOKENS = 4
MAX_CHOICES = 3
MAX_DEPTH = 12
WRONG_ONE_IN = 40  # places of a body
BROKEN_ONE_IN = 50  # bodies whose bytes are no sound JSON

# Field names that say what a string or an object without a schema of its own is meant to be.
SCHEMA_FIELDS = ("schema", "parameters", "input_schema")
JSON_TEXT_FIELDS = ("arguments",)
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
CHOICE_LIMITS = ("n", "best_of")
CONTENTS = ("messages", "prompt", "input")

_WORDS = [
    "hello",
    "f",
    "g",
    "a",
    "city",
    "",
    "\n",
    "<|im_end|>",
    "{{ 7 * 7 }}",
    "é",
    "日本",
    "\U0001f600",
    "\u202e",
    "\0",
]
_ODD_TEXT = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Co", "Cc", "Mn"]), min_size=1, max_size=4),
    st.sampled_from(
        ["x" * 5000, "</s>", "\ufffe", "%00", "../../etc/passwd", "' OR 1=1 --", "NaN", "null", "0", "true"]
    ),
)
_TEXT = st.one_of(st.sampled_from(_WORDS), st.text(max_size=8))
_NUMBERS = st.sampled_from(
    [0, 1, -1, 0.5, -0.0, 1.0, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**400,
     1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
)  # fmt: skip


def _nested(depth: int, kind: type) -> Any:
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


_DEEP = st.sampled_from([_nested(depth, kind) for depth in (30, 300) for kind in (list, dict)])
_LEAVES = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXT, _ODD_TEXT)
JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_ODD_TEXT, inner, max_size=3), max_leaves=6
)
WRONG = st.one_of(st.none(), _NUMBERS, _ODD_TEXT, JSON, _DEEP)

# -- JSON schemas, as clients send them for tools and structured output -----------------------------------------------

_SCHEMA_LEAVES = st.sampled_from(
    [
        *({"type": kind} for kind in ("string", "integer", "number", "boolean", "null", "object", "array", "zebra", 5)),
        *({}, True, False, {"type": ["string", "null"]}, {"enum": ["a", 1, None]}, {"enum": []}, {"const": {"a": [1]}}),
        *({"type": "string", "pattern": pattern} for pattern in ("^a+$", "(a+)+$", "(", "\\d{2,5}", "(?=a)b")),
        *({"type": "string", "format": name} for name in ("date", "uuid", "no such")),
        *({"$ref": to} for to in ("#/$defs/a", "#", "#/nowhere", "http://a/b")),
        *({"type": "string", "minLength": 1, "maxLength": 3}, {"type": "string", "minLength": 10**9}),
        *({"type": "integer", "minimum": 3, "maximum": 2}, {"type": "number", "multipleOf": 0}, {"minimum": "a"}),
        *({"type": "array", "minItems": 10**6}, {"not": {}}, {"required": ["a"]}, {"description": 5, "title": None}),
    ]
)


def _grown(inner: SearchStrategy[Any]) -> SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(["a", "b", "city", "é", ""]), inner, max_size=3)
    several = st.lists(inner, min_size=1, max_size=3)
    word = st.sampled_from(["anyOf", "oneOf", "allOf", "prefixItems"])
    return st.one_of(
        properties.map(
            lambda of: {"type": "object", "properties": of, "required": [*of], "additionalProperties": False}
        ),
        st.builds(
            lambda of, rest: {"type": "object", "properties": of, "additionalProperties": rest}, properties, inner
        ),
        inner.map(lambda of: {"type": "array", "items": of}),
        st.builds(lambda word, of: {word: of}, word, several),
        st.builds(lambda of, a: {**of, "$defs": {"a": a}} if isinstance(of, dict) else of, inner, inner),
        inner.map(lambda of: {"type": "object", "patternProperties": {"^x": of}, "unevaluatedProperties": of}),
        inner.map(lambda of: {"if": of, "then": of, "else": of, "contains": of, "dependentSchemas": {"a": of}}),
    )


JSON_SCHEMAS = st.recursive(_SCHEMA_LEAVES, _grown, max_leaves=8)

# -- bodies from a schema ----------------------------------------------------------------------------------------------


class Bodies:
    """Args: `definitions`, what `#/components/schemas/…` refers to; `model`, the name a request has to give."""

    def __init__(self, definitions: Mapping[str, Any], model: str) -> None:
        self._definitions = definitions
        self._model = model

    def of(self, schema: Mapping[str, Any], defaults: Mapping[str, Any]) -> SearchStrategy[bytes]:
        """Whole bodies as they go over the wire; `defaults` are fields that each has, in whatever way."""

        @st.composite
        def body(draw: DrawFn) -> bytes:
            value = self._draw(draw, schema, "", 0)
            if isinstance(value, dict):
                value = _small({**defaults, **value})
            text = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
            return draw(_broken(text)) if _seldom(draw, BROKEN_ONE_IN) else text

        return body()

    def _draw(self, draw: DrawFn, schema: Mapping[str, Any], name: str, depth: int) -> Any:
        """A value for the field `name`, most likely one that `schema` allows."""
        if "$ref" in schema:
            schema = self._definitions[schema["$ref"].rpartition("/")[2]]
        if _seldom(draw, WRONG_ONE_IN):
            return draw(WRONG)
        if name == "model":
            return self._model
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return draw(st.sampled_from(schema["enum"]))
        for word in ("anyOf", "oneOf"):
            if word in schema:
                null = {"type": "null"}
                choices = [choice for choice in schema[word] if choice != null or name not in CONTENTS]
                if depth >= MAX_DEPTH and null in choices:
                    return None
                return self._draw(draw, draw(st.sampled_from(choices)), name, depth)
        makers: dict[str, Callable[..., Any]] = {"object": self._object, "array": self._array}
        kind = schema.get("type")
        return makers[kind](draw, schema, name, depth) if kind in makers else draw(_scalar(schema, name))

    def _object(self, draw: DrawFn, schema: Mapping[str, Any], name: str, depth: int) -> Any:
        if "properties" not in schema:
            if name in SCHEMA_FIELDS:
                return draw(JSON_SCHEMAS)
            rest = schema.get("additionalProperties", True)
            if rest is True:
                return draw(st.dictionaries(_TEXT, JSON, max_size=3))
            keys = st.sampled_from(["0", "5", "511", "512", "1000000", "a", "01", ""])
            return {draw(keys): self._draw(draw, rest, "", depth + 1) for _ in range(draw(st.integers(0, 3)))}
        required = schema.get("required", [])
        optional = [field for field in schema["properties"] if field not in required]
        some = draw(st.lists(st.sampled_from(optional), max_size=4 if depth else 6, unique=True)) if optional else []
        contents = [field for field in optional if field in CONTENTS and "enum" not in schema["properties"][field]]
        if contents:  # seldom are two of them right, or none
            some = [field for field in some if field not in CONTENTS] + [draw(st.sampled_from(contents))]
        names = [field for field in [*required, *some] if not _seldom(draw, WRONG_ONE_IN)]
        value = {field: self._draw(draw, schema["properties"][field], field, depth + 1) for field in names}
        if _seldom(draw, WRONG_ONE_IN):
            value[draw(_ODD_TEXT)] = draw(WRONG)
        return value

    def _array(self, draw: DrawFn, schema: Mapping[str, Any], name: str, depth: int) -> Any:
        least = schema.get("minItems", 0)
        length = draw(st.integers(least, least + 2))
        if _seldom(draw, WRONG_ONE_IN):
            length = draw(st.sampled_from([0, 5, min(schema.get("maxItems", 150), 150) + 1]))
        if length > 20:
            return [self._draw(draw, schema.get("items", {}), "", depth + 1)] * length
        return [self._draw(draw, schema.get("items", {}), "", depth + 1) for _ in range(length)]


def _scalar(schema: Mapping[str, Any], name: str) -> SearchStrategy[Any]:
    match schema.get("type"):
        case "string" if "pattern" in schema:
            return st.one_of(st.sampled_from(["f", "g"]), st.from_regex(schema["pattern"], fullmatch=True))
        case "string" if name in JSON_TEXT_FIELDS:
            return st.one_of(st.just("{}"), JSON.map(json.dumps), _TEXT)
        case "string":
            return _TEXT.filter(lambda text: len(text) >= schema.get("minLength", 0))
        case "integer" | "number":
            return _number(schema)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return JSON


def _number(schema: Mapping[str, Any]) -> SearchStrategy[Any]:
    """What is usual, the edges of what is allowed and, seldom, one step over them."""
    low = schema.get("minimum", schema.get("exclusiveMinimum", -100))
    high = schema.get("maximum", 100)
    usual = [value for value in (0, 1, 2, 3) if low <= value <= high] or [low]
    likely = st.floats(low, high) if schema["type"] == "number" else st.sampled_from(usual)
    return st.sampled_from([*usual * 4, low, high, low, high, low - 1, high + 1]) | likely


def _seldom(draw: DrawFn, one_in: int) -> bool:
    # The last of them, since Hypothesis shrinks towards the first.
    return draw(st.integers(1, one_in)) == one_in


def _small(body: dict[str, Any]) -> dict[str, Any]:
    """So that no answer is more than a few steps of the ring."""
    for names, most in ((TOKEN_LIMITS, MAX_TOKENS), (CHOICE_LIMITS, MAX_CHOICES)):
        for name in names:
            if type(body.get(name)) is int and most < body[name] < 2**31:
                body[name] = 1 + body[name] % most
    return body


def _broken(text: bytes) -> SearchStrategy[bytes]:
    return st.one_of(
        st.integers(0, len(text)).map(lambda end: text[:end]),
        st.just(text + text),
        st.just(text.replace(b"{", b'{"model": 1, "model": 2, ', 1)),
        st.just(text.replace(b'"', b"'")),
        st.just(b"\xef\xbb\xbf" + text),
        st.just(b"[" * 20_000),
        st.binary(max_size=20),
    )
