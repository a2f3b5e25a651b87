"""Grammars of requests: what fits them and what does not, and refusals that name the keyword and its place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from api.errors import InvalidRequest, UnsupportedParameter
from api.structured.grammar import (
    SpecialTokens,
    after_reasoning,
    either,
    json_object,
    json_schema,
    tool_calls,
)
from api.structured.request_schemas import Function
from tests.grammars import fits, special_ids

PARAM = "response_format.json_schema.schema"
BOUND_S = 5.0  # what takes a second here may take several on a machine under load

Schema = dict[str, Any]


def grammar_of(schema: Schema, *, strict: bool | None = None) -> str:
    return json_schema(schema, strict=strict, param=PARAM)


def accepts(schema: Schema, *values: Any) -> list[bool]:
    grammar = grammar_of(schema)
    return [fits(grammar, value if isinstance(value, str) else json.dumps(value)) for value in values]


def an_object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


# -- what is accepted ------------------------------------------------------------------------------------------------


def test_json_object_is_any_object_and_nothing_else():
    grammar = json_object()
    assert fits(grammar, '{"a": [1, {"b": null}], "c": "\\u0007é"}') and fits(grammar, "{}")
    for text in ("[]", "1", "", " {}", '{"a": 1', '{"a": 01}', '{"a":\n1}', "{}{}"):
        assert not fits(grammar, text), text


def test_keywords_are_enforced():
    assert accepts(an_object(a={"type": "integer", "minimum": 3}), {"a": 3}, {"a": 2}, {"a": 3.5}, {}) == [True] + 3 * [
        False
    ]
    assert accepts({"enum": ["x", 2, None]}, '"x"', "2", "null", '"y"') == [True, True, True, False]
    assert accepts({"const": 0.5}, "0.5", "0.51") == [True, False]
    assert accepts({"type": "array", "items": {"type": "string"}, "minItems": 1}, [], ["a"], [1]) == [
        False,
        True,
        False,
    ]
    assert accepts({"type": "string", "pattern": "^a+$", "maxLength": 2}, '"aa"', '"aaa"', '"b"') == [
        True,
        False,
        False,
    ]
    assert accepts({"type": "string", "format": "date"}, '"2024-02-29"', '"2024-13-01"') == [True, False]
    assert accepts({"type": ["integer", "null"], "multipleOf": 5}, 10, None, 7) == [True, True, False]
    pair = [{"type": "integer"}, {"type": "string"}]
    assert accepts({"type": "array", "items": pair, "additionalItems": False}, [1, "a"], [1, "a", 2]) == [True, False]


def test_what_says_nothing_about_values_is_left_out():
    annotated = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "$id": "https://example.com/schema",
        "title": "A title",
        "description": "x" * 1000,
        "type": "string",
        "default": {"not": "looked at"},
        "examples": [{"if": 1}],
        "uniqueItems": False,
        "x-order": 3,
        "deprecated": True,
        "$defs": {"unused": {"not": {}}},
    }
    assert grammar_of(annotated) == grammar_of({"type": "string"})
    assert grammar_of(annotated, strict=True) == grammar_of({"type": "string"})


def test_unknown_keywords_are_annotations_unless_the_schema_is_strict():
    schema = an_object(a={"type": "string", "minimumLength": 3})
    assert grammar_of(schema) == grammar_of(an_object(a={"type": "string"}))
    with pytest.raises(
        UnsupportedParameter, match=r"at \$\.properties\.a\.minimumLength: .*'minimumLength' is not known"
    ):
        grammar_of(schema, strict=True)


def test_formats_of_numbers_are_annotations():
    assert accepts({"type": "integer", "format": "int32"}, 5) == [True]


def test_references_may_recur_and_lead_anywhere_in_the_schema():
    tree = {
        "$ref": "#/$defs/tree%20of~1numbers",
        "$defs": {
            "tree of/numbers": {
                "anyOf": [
                    {"type": "integer"},
                    {"type": "array", "items": {"$ref": "#/$defs/tree%20of~1numbers"}},
                ]
            }
        },
    }
    assert accepts(tree, [1, [2, [], [[3]]]], 4, ["x"], [1, [None]]) == [True, True, False, False]
    linked = an_object(value={"type": "integer"})
    linked["properties"] |= {"next": {"$ref": "#"}, "least": {"$ref": "#/properties/value"}}
    assert accepts(linked, {"value": 1, "next": {"value": 2, "least": 1}}) == [True]
    assert accepts(linked, {"value": 1, "next": {"value": 2, "least": "1"}}) == [False]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "puppy"]
    friend: Cat | Dog | None = None


def test_one_of_options_that_exclude_each_other_is_enforced():
    pets = {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "discriminator": {"propertyName": "kind"}}
    schema = pets | {"$defs": Dog.model_json_schema()["$defs"]}
    assert accepts(schema, {"kind": "cat", "lives": 9}, {"kind": "puppy", "friend": None}) == [True, True]
    assert accepts(schema, {"kind": "dog", "lives": "9"}, {"kind": "bird"}) == [True, False]
    assert accepts({"oneOf": [{"type": "string"}, {"type": "array"}, {"enum": [1, 2]}]}, '"a"', [], 1, 3) == [
        True,
        True,
        True,
        False,
    ]


# -- what is refused -------------------------------------------------------------------------------------------------

NESTED = "$.properties.a.anyOf[1].items"


@pytest.mark.parametrize(
    ("keyword", "value", "named"),
    [
        ("not", {}, "not"),
        ("if", {}, "if"),
        ("contains", {}, "contains"),
        ("uniqueItems", True, "uniqueItems"),
        ("propertyNames", {"pattern": "^a"}, "propertyNames"),
        ("dependentRequired", {}, "dependentRequired"),
        ("unevaluatedProperties", False, "unevaluatedProperties"),
        ("$dynamicRef", "#a", "$dynamicRef"),
        ("nullable", True, "nullable"),
        ("format", "path", "format"),
        ("pattern", "(?=a)b", "pattern"),
        ("pattern", "(a)\\1", "pattern"),
        ("$ref", "https://example.com/schema", "$ref"),
        ("$ref", "#anchor", "$ref"),
        ("const", 2**60, "const"),
        ("enum", [1, [2**53 + 2]], "enum"),
        ("minLength", 2**64, "minLength"),
        ("multipleOf", 123456789, "multipleOf"),
        ("oneOf", [{"type": "integer"}, {"minimum": 3}], "oneOf"),
        ("patternProperties", {"^a": {}, "a": {}}, "patternProperties"),
    ],
)
def test_what_cannot_be_enforced_is_named_with_its_place(keyword: str, value: Any, named: str):
    schema = an_object(a={"anyOf": [{"type": "null"}, {"type": "array", "items": {keyword: value}}]})
    with pytest.raises(UnsupportedParameter) as refusal:
        grammar_of(schema)
    assert refusal.value.param == PARAM
    assert f" at {NESTED}.{named}: " in refusal.value.message


def test_the_place_is_found_behind_references_and_under_odd_names():
    schema = {"$ref": "#/$defs/a b", "$defs": {"a b": an_object(c={"type": "object", "minProperties": 2})}}
    schema["$defs"]["a b"]["properties"]["c"]["properties"] = {"d": {}, "e": {}}
    with pytest.raises(UnsupportedParameter, match=r'at \$\.\$defs\["a b"\]\.properties\.c: min/maxProperties only'):
        grammar_of(schema)


def test_a_refusal_shows_no_names_of_our_own():
    around = {"anyOf": [{"type": "null"}, {"allOf": [{"$ref": "#/$defs/A"}, {"type": "string"}]}]}
    with pytest.raises(UnsupportedParameter) as refusal:
        grammar_of({"$ref": "#/$defs/A", "$defs": {"A": around}})
    assert refusal.value.message.endswith("circular references with sibling keys are not supported.")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "text"}, "$.type"),
        ({"properties": []}, "$.properties"),
        ({"properties": {"a": 1}}, "$.properties.a"),
        ({"required": "a"}, "$.required"),
        ({"required": [1]}, "$.required"),
        ({"minLength": -1}, "$.minLength"),
        ({"minItems": 1.5}, "$.minItems"),
        ({"maximum": "3"}, "$.maximum"),
        ({"multipleOf": 0}, "$.multipleOf"),
        ({"enum": {}}, "$.enum"),
        ({"anyOf": {}}, "$.anyOf"),
        ({"pattern": 1}, "$.pattern"),
        ({"format": []}, "$.format"),
        ({"$ref": 1}, "$.$ref"),
        ({"$ref": "#/$defs/none"}, "$.$ref"),
        ({"items": {"$ref": "#/items"}}, "$.items"),
        (an_object(a={"allOf": [{"type": "string"}, {"type": "integer"}]}), "$.properties.a"),
        ({"anyOf": []}, "$"),
    ],
)
def test_a_wrong_schema_or_one_that_nothing_fits_is_refused_with_the_place(schema: Schema, place: str):
    with pytest.raises(InvalidRequest) as refusal:
        grammar_of(schema)
    assert not isinstance(refusal.value, UnsupportedParameter) and refusal.value.param == PARAM
    assert f" at {place}: " in refusal.value.message


def nested(depth: int, around: Callable[[Schema], Schema]) -> Schema:
    schema: Schema = {"type": "string"}
    for _ in range(depth):
        schema = around(schema)
    return schema


def many(count: int, schema: Schema, **others: Any) -> Schema:
    return {"type": "object", "properties": {f"p{index}": schema for index in range(count)}, **others}


HUGE: dict[str, Schema] = {
    "bytes": {"type": "string", "description": "x" * 300_000},
    "nested objects": nested(200, lambda inner: an_object(a=inner)),
    "nested beyond recursion": nested(3000, lambda inner: {"items": inner}),
    "nested lists": nested(100, lambda inner: {"anyOf": [inner, {"type": "null"}]}),
    "a chain of references": {
        "$ref": "#/$defs/0",
        "$defs": {str(index): {"items": {"$ref": f"#/$defs/{index + 1}"}} for index in range(5000)} | {"5000": {}},
    },
    "optional properties": many(3000, {"type": "string"}),
    "counted properties": many(1000, {}, minProperties=1, additionalProperties=False),
    "required names": {"required": [f"r{index}" for index in range(12_000)]},
    "untyped": many(2000, {"minLength": 2, "maximum": 3}, required=[f"p{index}" for index in range(2000)]),
    "alternatives of alternatives": {
        "allOf": [{"anyOf": [{"type": "string", "minLength": 10 * i + j} for j in range(10)]} for i in range(10)]
    },
    "patterns that hold at once": {
        "allOf": [{"type": "string", "pattern": f"a{{{n}}}.*b(a|b){{{n}}}c"} for n in range(1, 50)]
    },
    "patterns of properties": {"patternProperties": {f"^a{{{n}}}b*$": {} for n in range(100)}},
    "a pattern": {"type": "string", "pattern": "^((a|b){1,500}c){1,500}$", "minLength": 100, "maxLength": 100_000},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": 9973}, {"type": "integer", "multipleOf": 9967}]},
    "objects to match": {"enum": [{"a": {"b": n}} for n in range(10_000)]},
    "a deep value": {"const": nested(50, lambda inner: {"a": inner})},
}


@pytest.mark.parametrize("schema", HUGE.values(), ids=HUGE)
def test_a_schema_that_is_too_large_is_refused_in_bounded_time(schema: Schema):
    started = time.monotonic()
    with pytest.raises(InvalidRequest) as refusal:
        grammar_of(schema)
    assert time.monotonic() - started < BOUND_S
    assert refusal.value.param == PARAM and len(refusal.value.message) < 1000


LARGE: dict[str, Schema] = {
    "optional properties": many(500, {"type": "integer"}),
    "properties": many(2500, {"type": "string"}, required=[f"p{index}" for index in range(2500)]),
    "lengths": {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}},
    "a long constant": {"const": "x" * 200_000},
    "an enumeration": {"enum": [f"value {index}" for index in range(10_000)]},
    "nested objects": nested(40, lambda inner: an_object(a=inner)),
}


@pytest.mark.parametrize("schema", LARGE.values(), ids=LARGE)
def test_a_large_schema_is_compiled_in_bounded_time(schema: Schema):
    started = time.monotonic()
    grammar_of(schema)
    assert time.monotonic() - started < BOUND_S


def test_the_same_schema_is_compiled_once():
    schema = many(400, {"type": "string", "maxLength": 77})
    started = time.process_time()
    first = grammar_of(schema)
    compiled = time.process_time()
    assert grammar_of(json.loads(json.dumps(schema))) == first
    assert time.process_time() - compiled < (compiled - started) / 3


# -- tools -----------------------------------------------------------------------------------------------------------

SPECIAL = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|im_end|>", "<cite>"]
AS_TOKENS = SpecialTokens(special_ids(SPECIAL), [special_ids(SPECIAL)["<|im_end|>"]])
AS_TEXT = SpecialTokens({})
ADD = Function("add", an_object(a={"type": "integer"}), True, "tools[0].function.parameters")
NOW = Function("now", None, False, "tools[1].function.parameters")

CALL_ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CALL_NOW = '<tool_call>\n{"name":"now","arguments":{}}\n</tool_call>'
NO_CALLS = [
    CALL_ADD.replace("1", '"1"'),
    CALL_ADD.replace("add", "sub"),
    CALL_ADD.replace("\n</tool_call>", ""),
    CALL_ADD.replace('{"a": 1}', "{}"),
    CALL_ADD.replace("name", "function"),
    "<tool_call>add</tool_call>",
]

both_kinds_of_markers = pytest.mark.parametrize("special", [AS_TOKENS, AS_TEXT], ids=["tokens", "text"])


def calls(special: SpecialTokens, *functions: Function, required: bool = False, parallel: bool = False) -> str:
    return tool_calls(
        functions or (ADD, NOW),
        begin="<tool_call>\n",
        end="\n</tool_call>",
        required=required,
        parallel=parallel,
        special_tokens=special,
    )


def fits_with(special: SpecialTokens, grammar: str, text: str) -> bool:
    return fits(grammar, text, SPECIAL if special is AS_TOKENS else None)


@both_kinds_of_markers
def test_a_required_call_is_one_call_and_nothing_else(special: SpecialTokens):
    grammar = calls(special, required=True)
    for text in (CALL_ADD, CALL_NOW):
        assert fits_with(special, grammar, text), text
    for text in ["", "Hello", "Hello " + CALL_ADD, CALL_ADD + " ", CALL_ADD + CALL_NOW, *NO_CALLS]:
        assert not fits_with(special, grammar, text), text


@both_kinds_of_markers
def test_several_calls_may_follow_each_other_where_they_are_parallel(special: SpecialTokens):
    grammar = calls(special, required=True, parallel=True)
    for text in (CALL_ADD, CALL_ADD + "\n" + CALL_NOW, CALL_NOW + CALL_ADD + CALL_NOW):
        assert fits_with(special, grammar, text), text
    for text in ["", CALL_ADD + "\n", CALL_ADD + " and " + CALL_NOW, *(CALL_ADD + "\n" + no for no in NO_CALLS)]:
        assert not fits_with(special, grammar, text), text


@both_kinds_of_markers
def test_text_is_free_until_a_marker_begins_a_call(special: SpecialTokens):
    grammar = calls(special)
    for text in ("", "Hello", 'Hello {"name": 1} <tool', CALL_ADD, "I add:\n" + CALL_ADD):
        assert fits_with(special, grammar, text), text
    for text in (CALL_ADD + CALL_NOW, CALL_ADD + "Done.", *("I add: " + no for no in NO_CALLS)):
        assert not fits_with(special, grammar, text), text


@both_kinds_of_markers
def test_text_and_calls_alternate_where_calls_are_parallel(special: SpecialTokens):
    grammar = calls(special, parallel=True)
    for text in ("", "Hello", CALL_ADD + CALL_NOW, f"One: {CALL_ADD} two: {CALL_NOW} done."):
        assert fits_with(special, grammar, text), text
    for no in NO_CALLS:
        assert not fits_with(special, grammar, CALL_NOW + " and " + no), no


def test_other_special_tokens_are_free_in_text_but_those_that_end_an_answer():
    grammar = calls(AS_TOKENS)
    assert fits_with(AS_TOKENS, grammar, "See <cite>this</think> " + CALL_ADD)
    assert not fits_with(AS_TOKENS, grammar, "See <|im_end|> " + CALL_ADD)


def test_a_function_without_parameters_takes_an_empty_object():
    grammar = calls(AS_TEXT, NOW, required=True)
    assert fits(grammar, CALL_NOW) and not fits(grammar, CALL_NOW.replace("{}", '{"a": 1}'))


def test_a_function_that_is_not_strict_is_enforced_as_far_as_can_be_where_a_call_is_required():
    schema = an_object(a={"type": "integer", "not": {"const": 3}}, b={"type": "string", "format": "path"})
    loose = Function("add", schema, False, "tools[0].function.parameters")
    grammar = calls(AS_TEXT, loose, required=True)
    assert fits(grammar, CALL_ADD.replace('{"a": 1}', '{"a": 3, "b": "/tmp"}'))
    assert not fits(grammar, CALL_ADD.replace('{"a": 1}', '{"a": "3", "b": "/tmp"}'))
    uncompilable = Function("add", {"type": "object", "minProperties": 1, "properties": {"a": {}, "b": {}}}, False, "x")
    assert fits(calls(AS_TEXT, uncompilable, required=True), CALL_ADD)


def test_a_function_that_is_not_strict_is_free_where_no_call_is_required():
    schema = an_object(a={"type": "string"})
    grammar = calls(AS_TEXT, Function("add", schema, False, "tools[0].function.parameters"))
    assert fits(grammar, CALL_ADD) and not fits(grammar, CALL_ADD.replace('{"a": 1}', "[]"))


def test_a_strict_function_that_cannot_be_enforced_is_refused_by_its_name():
    strict = Function("add", an_object(a={"not": {}}), True, "tools[3].function.parameters")
    with pytest.raises(UnsupportedParameter, match=r"at \$\.properties\.a\.not: ") as refusal:
        calls(AS_TEXT, NOW, strict)
    assert refusal.value.param == "tools[3].function.parameters"
    wrong = Function("add", {"type": "object", "properties": 1}, False, "tools[0].function.parameters")
    with pytest.raises(InvalidRequest, match=r"at \$\.properties: "):
        calls(AS_TEXT, wrong, required=True)


@pytest.mark.parametrize("strict", [True, False])
def test_a_function_whose_arguments_could_be_no_object_is_refused_by_its_name(strict: bool):
    text = Function("add", {"anyOf": [{"type": "string"}, {"type": "array"}]}, strict, "tools[1].function.parameters")
    with pytest.raises(InvalidRequest, match="no object fits this") as refusal:
        calls(AS_TEXT, NOW, text, required=True)
    assert (refusal.value.param, refusal.value.code) == ("tools[1].function.parameters", "invalid_value")


def test_functions_keep_definitions_of_the_same_name_apart():
    def function(name: str, kind: str) -> Function:
        parameters = an_object(a={"$ref": "#/$defs/A"}) | {"$defs": {"A": {"type": kind}}}
        return Function(name, parameters, True, "tools[0].function.parameters")

    grammar = calls(AS_TEXT, function("add", "integer"), function("say", "string"), required=True)
    assert fits(grammar, CALL_ADD) and not fits(grammar, CALL_ADD.replace("1", '"1"'))
    assert fits(grammar, CALL_ADD.replace("add", "say").replace("1", '"1"'))


def test_arguments_are_an_object_whatever_the_schema_says():
    grammar = calls(AS_TEXT, Function("add", {"properties": {"a": {"type": "integer"}}}, True, "x"), required=True)
    assert fits(grammar, CALL_ADD) and not fits(grammar, CALL_ADD.replace('{"a": 1}', "3"))


def test_very_many_tools_are_bounded_too():
    tools = [Function(f"f{index}", many(60, {"type": "string"}), False, f"tools[{index}]") for index in range(300)]
    started = time.monotonic()
    grammar = calls(AS_TEXT, *tools, required=True)
    assert time.monotonic() - started < BOUND_S
    assert fits(grammar, '<tool_call>\n{"name": "f299", "arguments": {}}\n</tool_call>')


def test_content_by_a_schema_or_calls():
    content = grammar_of(an_object(a={"type": "null"}))
    grammar = either(content, calls(AS_TEXT, required=True))
    assert fits(grammar, '{"a": null}') and fits(grammar, CALL_NOW)
    assert not fits(grammar, '{"a": 1}') and not fits(grammar, '{"a": null}' + CALL_NOW)


# -- reasoning -------------------------------------------------------------------------------------------------------


@both_kinds_of_markers
def test_reasoning_that_the_prompt_began_is_free_and_the_answer_is_not(special: SpecialTokens):
    grammar = after_reasoning(json_object(), end="</think>", special_tokens=special)
    for text in ('Hm, {"a"}.\n</think>\n\n{"a": 1}', "</think>{}", "x</think>\n{}"):
        assert fits_with(special, grammar, text), text
    for text in ("{}", "Hm.", "Hm.</think>Hm.", "Hm.</think>\n\n\n{}", "</think>"):
        assert not fits_with(special, grammar, text), text


@both_kinds_of_markers
def test_a_model_may_reason_or_not_where_it_begins_itself(special: SpecialTokens):
    grammar = after_reasoning(json_object(), begin="<think>", end="</think>", special_tokens=special)
    for text in ("{}", "<think>Hm.</think>\n\n{}", '{"a": 1}'):
        assert fits_with(special, grammar, text), text
    for text in ("Hm.</think>{}", "<think>{}", "<think>Hm.</think>Hm."):
        assert not fits_with(special, grammar, text), text


@both_kinds_of_markers
def test_calls_follow_reasoning_that_may_speak_of_them(special: SpecialTokens):
    for required in (True, False):
        rules = calls(special, required=required, parallel=True)
        grammar = after_reasoning(rules, end="</think>", special_tokens=special)
        assert fits_with(special, grammar, "A <tool_call> is due.</think>\n\n" + CALL_ADD)
        assert not fits_with(special, grammar, "A <tool_call> is due.</think>\n\n" + NO_CALLS[0])
    assert fits_with(special, grammar, "No call.</think>\n\nHello") and not fits_with(special, grammar, "Hello")


def test_no_special_token_ends_reasoning_but_its_own():
    grammar = after_reasoning(json_object(), end="</think>", special_tokens=AS_TOKENS)
    assert fits_with(AS_TOKENS, grammar, "<cite>a<tool_call></think>{}")
    assert not fits_with(AS_TOKENS, grammar, "a<|im_end|></think>{}")
