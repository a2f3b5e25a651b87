import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from api.output.parser import REASONING, OutputFormat, OutputParser
from api.output.tool_format import GENERIC
from api.tokenizer import ChatTokenizer
from tests.api.chat.template_models import MISTRAL, PYTHONIC, QWEN3, template_model

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = ("call", "add", '{"a": 1}')


def qwen_format(tokenizer: ChatTokenizer) -> OutputFormat:
    return OutputFormat(markers=tokenizer.markers(GENERIC), tool_format=GENERIC)


@pytest.fixture(scope="module")
def qwen(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OutputFormat:
    """Thinking, and calls in JSON."""
    folder = tmp_path_factory.mktemp("qwen")
    return qwen_format(template_model(tiny_chat_model, folder, QWEN3, added=["<think>", "</think>"]))


@pytest.fixture(scope="module")
def pythonic(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OutputFormat:
    tokenizer = template_model(tiny_chat_model, tmp_path_factory.mktemp("pythonic"), PYTHONIC)
    return OutputFormat(markers=tokenizer.markers(tokenizer.native_tools), tool_format=tokenizer.native_tools)


@pytest.fixture(scope="module")
def mistral(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OutputFormat:
    tokenizer = template_model(tiny_chat_model, tmp_path_factory.mktemp("mistral"), MISTRAL)
    return OutputFormat(markers=tokenizer.markers(tokenizer.native_tools), tool_format=tokenizer.native_tools)


def joined(deltas: Sequence[Delta]) -> list[tuple[str, ...]]:
    """The parts of an answer as a client puts them together."""
    parts: list[tuple[str, ...]] = []
    for delta in deltas:
        match delta:
            case ToolCallDelta(index, arguments, str(), str(name)):
                assert index == sum(part[0] == "call" for part in parts)
                parts.append(("call", name, arguments))
            case ToolCallDelta(index, more):
                assert parts[-1][0] == "call" and index == sum(part[0] == "call" for part in parts) - 1
                parts[-1] = (*parts[-1][:2], parts[-1][2] + more)
            case ContentDelta() | ReasoningDelta():
                kind = "content" if isinstance(delta, ContentDelta) else "reasoning"
                before = parts.pop()[1] if parts and parts[-1][0] == kind else None
                parts.append((kind, delta.text if before is None else before + delta.continuing))
    return parts


def parsed(output: OutputFormat, *pieces: str, stop: Sequence[str] = ()) -> list[tuple[str, ...]]:
    parser = OutputParser(output, stop)
    return joined([*[delta for piece in pieces for delta in parser.add(piece)], *parser.finish()])


def test_reasoning_is_apart_from_content(qwen: OutputFormat):
    text = "<think>\nhm\n</think>\n\nYes."
    expected = [("reasoning", "hm\n"), ("content", "Yes.")]
    assert parsed(qwen, text) == parsed(qwen, *text) == expected


def test_an_answer_may_begin_inside_reasoning(qwen: OutputFormat):
    output = replace(qwen, first=REASONING)
    assert parsed(output, "\nhm</think>Yes.") == [("reasoning", "hm"), ("content", "Yes.")]
    assert parsed(output, "<think>hm</think>Yes.") == [("reasoning", "hm"), ("content", "Yes.")]
    assert parsed(output, "hm") == [("reasoning", "hm")]


def test_text_that_almost_is_a_marker_is_text(qwen: OutputFormat):
    text = "a <thinker> </thin <tool_cal> b <"
    assert parsed(qwen, *text) == [("content", text)]


def test_content_without_markers_is_as_the_model_wrote_it():
    assert parsed(OutputFormat.plain(), "\n\n ", "<think>x") == [("content", "\n\n <think>x")]


def test_a_call_is_given_as_it_comes(qwen: OutputFormat):
    parser = OutputParser(qwen)
    assert parser.add('<tool_call>\n{"name": "ad') == []
    first, *others = parser.add('d", "arguments": {"a"')
    assert isinstance(first, ToolCallDelta) and not others
    assert (first.index, first.name, first.arguments) == (0, "add", '{"a"')
    assert first.id is not None and first.id.startswith("call_")
    assert parser.add(': "}"') == [ToolCallDelta(0, ': "}"')]
    assert parser.add("}}\n</tool") == [ToolCallDelta(0, "}")]
    assert parser.add("_call>") == [] == parser.finish()
    assert parser.has_tool_calls and not parser.stopped


def test_several_calls_and_the_whitespace_around_them(qwen: OutputFormat):
    assert parsed(qwen, f"<think>hm</think>\n\n{CALL}\n{CALL}\n") == [("reasoning", "hm"), ADD, ADD]
    assert parsed(qwen, f"Let me see.\n\n{CALL}") == [("content", "Let me see.\n\n"), ADD]
    assert parsed(qwen, f"{CALL}\nSo it is.") == [ADD, ("content", "So it is.")]
    assert parsed(qwen, " \n ") == [("content", " \n ")]


def test_a_call_ends_reasoning_that_was_not_ended(qwen: OutputFormat):
    assert parsed(qwen, f"<think>I call\n{CALL}") == [("reasoning", "I call\n"), ADD]


def test_arguments_are_the_model_s_own_text(qwen: OutputFormat):
    arguments = '{ "text":"</tool_call> \\" <tool_call> é\\u00e9","list":[{}, [1e3]] }'
    call = f'<tool_call>{{"name":"f","arguments":{arguments}}}</tool_call>'
    assert parsed(qwen, call) == parsed(qwen, *call) == [("call", "f", arguments)]


def test_other_layouts_of_a_call_are_read_too(qwen: OutputFormat):
    for call, arguments in [
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "parameters": {"a": 1}, "more": {}}', '{"a": 1}'),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
    ]:
        assert parsed(qwen, *f"<tool_call>{call}</tool_call>") == [("call", "f", arguments)]
    both = '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>'
    assert parsed(qwen, both) == [("call", "f", "{}"), ("call", "g", "{}")]


def test_a_call_without_its_end_marker_is_a_call(qwen: OutputFormat):
    assert parsed(qwen, CALL.removesuffix("\n</tool_call>")) == [ADD]
    assert parsed(qwen, CALL.replace("</tool_call>", CALL)) == [ADD, ADD]
    broken = '<tool_call>{"name": "add", "arguments": {"a": 1</tool_call>And so on'
    assert parsed(qwen, *broken) == [("call", "add", '{"a": 1'), ("content", "And so on")]


@pytest.mark.parametrize("length", range(len(CALL)))
def test_a_call_that_is_cut_short_is_given_as_far_as_it_came(qwen: OutputFormat, length: int):
    parts = parsed(qwen, CALL[:length])
    if '"arguments": {' in CALL[:length]:
        assert len(parts) == 1 and parts[0][:2] == ("call", "add")
        assert ADD[2].startswith(parts[0][2])
    elif '"add"' in CALL[:length]:
        assert parts == [("call", "add", "")]
    else:
        assert "".join(part[1] for part in parts) == CALL[:length].removeprefix("<tool_call>").lstrip("\n")


@pytest.mark.parametrize("length", range(len(CALL)))
def test_where_calls_are_required_a_cut_one_leaves_no_text(qwen: OutputFormat, length: int):
    output = replace(qwen, only_calls=True)
    for pieces in ([CALL[:length]], CALL[:length]):
        assert all(part[0] == "call" for part in parsed(output, *pieces))


@pytest.mark.parametrize(
    "text", ["no call", "{not json}", '{"a": 1}', "[]", "[1]", '{"name": 1}', '{"name": "f", "arguments": NaN}']
)
def test_what_is_no_call_is_given_back(qwen: OutputFormat, text: str):
    whole = f"See <tool_call>{text}</tool_call>"
    assert parsed(qwen, whole) == parsed(qwen, *whole) == [("content", f"See {text}")]


def test_text_that_was_no_call_may_hold_one(qwen: OutputFormat):
    text = f"<think>I write <tool_call>, then {CALL}"
    assert parsed(qwen, text) == parsed(qwen, *text) == [("reasoning", "I write , then "), ADD]
    text = f"<tool_call>{{ {CALL}"
    assert parsed(qwen, text) == parsed(qwen, *text) == [("content", "{ "), ADD]


def test_calls_in_a_model_s_own_format(pythonic: OutputFormat):
    text = 'Sure.<|tool_call_start|>[add(a=1), get(city="Zürich", deep={"x": true})]<|tool_call_end|>'
    expected = [
        ("content", "Sure."),
        ADD,
        ("call", "get", '{"city": "Zürich", "deep": {"x": true}}'),
    ]
    assert parsed(pythonic, text) == parsed(pythonic, *text) == expected
    assert parsed(pythonic, "<|tool_call_start|>nothing<|tool_call_end|>!") == [("content", "nothing!")]
    assert parsed(replace(pythonic, only_one_call=True), text) == expected[:2]


def test_calls_that_end_with_the_answer(mistral: OutputFormat):
    text = '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 1}'
    assert parsed(mistral, text) == parsed(mistral, *text) == [ADD, ADD]
    listed = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "a1b2c3d4e"}]'
    parser = OutputParser(mistral)
    assert [*parser.add(listed), *parser.finish()] == [ToolCallDelta(0, '{"a": 1}', "a1b2c3d4e", "add")]
    assert parsed(mistral, "[TOOL_CALLS]add[ARGS]{") == [("content", "add[ARGS]{")]


def test_where_one_call_is_allowed_the_answer_ends_with_it(qwen: OutputFormat):
    parser = OutputParser(replace(qwen, only_one_call=True))
    deltas = parser.add(CALL + CALL)
    assert parser.stopped
    assert joined(deltas) == [ADD]


def test_enforced_content_may_quote_any_marker(qwen: OutputFormat):
    output = replace(qwen, content_is_enforced=True)
    quoted = json.dumps({"text": f"<think> {CALL}"})
    text = f"<think>hm</think>\n{quoted}"
    assert parsed(output, text) == parsed(output, *text) == [("reasoning", "hm"), ("content", quoted)]
    assert parsed(output, *CALL) == [ADD]


def test_a_stop_string_ends_content_alone(qwen: OutputFormat):
    text = f"<think>STOP</think>\nyes {CALL.replace('add', 'STOP')} one STOP two"
    expected = [("reasoning", "STOP"), ("content", "yes "), ("call", "STOP", '{"a": 1}'), ("content", " one ")]
    assert parsed(qwen, text, stop=["STOP"]) == parsed(qwen, *text, stop=["STOP"]) == expected
    # What may have begun one is given before what follows.
    assert parsed(qwen, f"yes ST{CALL}", stop=["STOP"]) == [("content", "yes ST"), ADD]
    assert parsed(qwen, "yes ST", stop=["STOP"]) == [("content", "yes ST")]


FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "<thi", "</too", "<", "\n", " ", "text", "é🦊",
    '{"name": "add", "arguments": {', '"a": [1, {"b": "}"}]', "}", "}}", '{"name": "', '\\"', '"', "[", "STOP", "ST",
]  # fmt: skip


@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    stop=st.sampled_from([(), ("STOP",), ("\n ", "STOP")]),
    enforced=st.booleans(),
    only_one=st.booleans(),
)
def test_where_the_text_is_cut_never_matters(
    qwen: OutputFormat, fragments: list[str], cuts: list[int], stop: tuple[str, ...], enforced: bool, only_one: bool
):
    output = replace(qwen, content_is_enforced=enforced, only_one_call=only_one)
    text = "".join(fragments)
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    whole = parsed(output, text, stop=stop)
    assert parsed(output, *pieces, stop=stop) == parsed(output, *text, stop=stop) == whole
    if not enforced:
        for kind, *texts in whole:
            assert kind == "call" or not any(marker in texts[0] for marker in output.all_markers)


VALUES = st.recursive(
    st.text(max_size=12) | st.integers() | st.none(),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=4), value, max_size=3),
    max_leaves=6,
)


@given(
    calls=st.lists(st.dictionaries(st.text(max_size=8), VALUES, max_size=4), max_size=3),
    indent=st.sampled_from([None, 1]),
)
def test_any_arguments_come_out_as_they_were_written(
    qwen: OutputFormat, calls: list[dict[str, Any]], indent: int | None
):
    written = [json.dumps(arguments, indent=indent, ensure_ascii=indent is None) for arguments in calls]
    text = "\n".join(f'<tool_call>\n{{"name": "f", "arguments": {each}}}\n</tool_call>' for each in written)
    assert parsed(qwen, *text) == [("call", "f", each) for each in written]
