from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from api.output.parser import OutputFormat
from api.tokenizer import ChatTokenizer
from tests.api.chat.template_models import MISTRAL, PYTHONIC, QWEN3, template_model

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é🦊"}}\n</tool_call>'


@pytest.fixture(scope="module")
def plain(tiny_chat_model: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_chat_model)


@pytest.fixture(scope="module", params=["markers are tokens", "markers are text"])
def qwen(
    request: pytest.FixtureRequest, tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> ChatTokenizer:
    added = ["<think>", "</think>"] + ["<tool_call>", "</tool_call>"] * (request.param == "markers are tokens")
    return template_model(tiny_chat_model, tmp_path_factory.mktemp("qwen"), QWEN3, added=added)


@pytest.fixture(scope="module")
def pythonic(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    special = ["<|tool_call_start|>", "<|tool_call_end|>", "<|reserved|>"]
    return template_model(tiny_chat_model, tmp_path_factory.mktemp("pythonic"), PYTHONIC, special=special)


@pytest.fixture(scope="module")
def mistral(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    special = ["[TOOL_CALLS]", "[ARGS]"]
    return template_model(tiny_chat_model, tmp_path_factory.mktemp("mistral"), MISTRAL, special=special)


def with_tools(tokenizer: ChatTokenizer) -> OutputFormat:
    return OutputFormat(markers=tokenizer.markers(tokenizer.native_tools), tool_format=tokenizer.native_tools)


def read(tokenizer: ChatTokenizer, output: OutputFormat, ids: Sequence[int], stop: Sequence[str] = ()) -> list[Delta]:
    reader = tokenizer.output_reader(output, stop)
    return [*[delta for token_id in ids for delta in reader.add([token_id])], *reader.finish()]


def content(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))


def reasoning(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))


def calls(deltas: Sequence[Delta]) -> list[tuple[str | None, str]]:
    found: list[tuple[str | None, str]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            name, before = (delta.name, "") if delta.id is not None else found.pop()
            found.append((name, before + delta.arguments))
    return found


def test_special_tokens_are_no_text(plain: ChatTokenizer):
    ids = [*plain.encode_prompt("one"), plain.stop_token_ids[0], *plain.encode_prompt("<|endoftext|> two")]
    reader = plain.output_reader(OutputFormat.plain(), [])
    assert content([*reader.add(ids), *reader.finish()]) == "one two"
    assert reader.num_tokens == len(ids)


def test_nothing_after_a_stop_string_is_taken_or_counted(plain: ChatTokenizer):
    before, after = plain.encode_prompt("one two STOP"), plain.encode_prompt(" three")
    reader = plain.output_reader(OutputFormat.plain(), ["STOP"])
    assert content(reader.add([*before, *after])) == "one two "
    assert reader.stopped
    assert reader.num_tokens == len(before)
    assert reader.finish() == []


def test_a_stop_string_is_found_across_the_borders_of_tokens(plain: ChatTokenizer):
    ids = plain.encode_prompt("question: fox? answer")
    assert content(read(plain, OutputFormat.plain(), ids, stop=["x? an"])) == "question: fo"


def test_a_character_that_never_became_whole_is_left_out(plain: ChatTokenizer):
    assert content(read(plain, OutputFormat.plain(), plain.encode_prompt("ok 🦊")[:-1])) == "ok "


def test_reasoning_tokens_are_counted_with_their_markers(qwen: ChatTokenizer):
    thought, answer = qwen.encode_prompt("<think>\nhm hm</think>"), qwen.encode_prompt("\n\nYes.")
    reader = qwen.output_reader(with_tools(qwen), [])
    deltas = [*reader.add([*thought, *answer]), *reader.finish()]
    assert reasoning(deltas) == "hm hm"
    assert content(deltas) == "Yes."
    assert (reader.num_reasoning_tokens, reader.num_tokens) == (len(thought), len(thought) + len(answer))


def test_calls_are_read_whether_their_markers_are_tokens_or_not(qwen: ChatTokenizer):
    ids = qwen.encode_prompt(f"Let me see: {CALL}\n{CALL}")
    deltas = read(qwen, with_tools(qwen), [*ids, qwen.stop_token_ids[0]])
    assert calls(deltas) == [("add", '{"a": "é🦊"}')] * 2
    assert content(deltas) == "Let me see: "


def test_special_tokens_are_markers_in_their_place_alone(pythonic: ChatTokenizer):
    text = 'A<|reserved|>B<|tool_call_end|>C<|tool_call_start|>[add(a="é🦊")]<|tool_call_end|>'
    deltas = read(pythonic, with_tools(pythonic), pythonic.encode_prompt(text))
    assert content(deltas) == "ABC"
    assert calls(deltas) == [("add", '{"a": "é🦊"}')]
    # Without tools such a token is as invisible as any.
    assert content(read(pythonic, OutputFormat(), pythonic.encode_prompt(text))) == 'ABC[add(a="é🦊")]'


def test_special_tokens_within_a_call_are_part_of_it(mistral: ChatTokenizer):
    output = with_tools(mistral)
    ids = mistral.encode_prompt('[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get[ARGS]{}')
    assert calls(read(mistral, output, [*ids, mistral.stop_token_ids[0]])) == [("add", '{"a": 1}'), ("get", "{}")]
    assert content(read(mistral, output, mistral.encode_prompt("[TOOL_CALLS]add[ARGS]no"))) == "addno"


def test_special_tokens_that_only_begin_a_marker_are_no_text(tiny_chat_model: Path, tmp_path: Path):
    """Gemma's reasoning begins with a special token and a word."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}{{ '<|channel>thought' if think }}"
    model = template_model(tiny_chat_model, tmp_path, template, special=["<|channel>", "<channel|>"])
    output = OutputFormat(markers=model.markers(None))
    deltas = read(model, output, model.encode_prompt("<|channel>thought\nhm<channel|>A<|channel>thin"))
    assert (reasoning(deltas), content(deltas)) == ("hm", "Athin")


def test_tokens_in_reasoning_that_are_no_text_count_as_well(qwen: ChatTokenizer):
    reader = qwen.output_reader(with_tools(qwen), [])
    assert reader.add([*qwen.encode_prompt("<think>"), *qwen.encode_prompt("🦊")[:1], qwen.stop_token_ids[0]]) == []
    assert reader.finish() == []
    assert reader.num_reasoning_tokens == 3


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", CALL, "<tool_call>", "é🦊", " a", "\n", "}"]), max_size=8),
    steps=st.lists(st.integers(1, 9), max_size=9),
)
def test_how_many_tokens_a_step_has_never_matters(qwen: ChatTokenizer, text: list[str], steps: list[int]):
    ids = qwen.encode_prompt("".join(text))
    one_by_one = read(qwen, with_tools(qwen), ids)
    reader = qwen.output_reader(with_tools(qwen), [])
    deltas: list[Delta] = []
    rest = ids
    for step in steps:
        deltas += reader.add(rest[:step])
        rest = rest[step:]
    deltas += [*reader.add(rest), *reader.finish()]
    assert (content(deltas), calls(deltas)) == (content(one_by_one), calls(one_by_one))
    assert reader.num_tokens == len(ids)
    assert "tool_call>" not in content(deltas) and "think>" not in content(deltas)
