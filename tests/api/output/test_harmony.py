"""gpt-oss's answers: what of their messages is reasoning, content or a call, wherever they are cut."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.output.harmony import HEADER, SHOWN_AS, TOKENS
from api.output.parser import CONTENT, OutputFormat
from api.output.tool_format import HARMONY
from api.tokenizer import ChatTokenizer
from tests.api.chat.template_models import QWEN3, harmony_model, template_model
from tests.api.output.test_output_parser import joined, parsed

NEXT = "<|end|><|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>hm"
FINAL = "<|channel|>final<|message|>Yes."
PREAMBLE = "<|channel|>commentary<|message|>I add."
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
ADD = ("call", "add", '{"a": 1}')


@pytest.fixture(scope="module")
def model(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return harmony_model(tiny_chat_model, tmp_path_factory.mktemp("harmony"))


@pytest.fixture(scope="module")
def output(model: ChatTokenizer) -> OutputFormat:
    return OutputFormat(
        markers=model.markers(HARMONY),
        first=HEADER,
        tool_format=HARMONY,
        has_messages=True,
        shown_as=SHOWN_AS,
    )


def shown(text: str) -> str:
    """As the parser gets it."""
    return re.sub("|".join(map(re.escape, TOKENS)), lambda token: SHOWN_AS[token[0]], text)


def read(output: OutputFormat, text: str, stop: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The parts of the answer; the same in one piece, letter by letter, and cut in two anywhere."""
    text = shown(text)
    whole = parsed(output, text, stop=stop)
    assert parsed(output, *text, stop=stop) == whole
    for cut in range(len(text)):
        assert parsed(output, text[:cut], text[cut:], stop=stop) == whole
    return whole


def by_tokens(model: ChatTokenizer, output: OutputFormat, ids: Sequence[int]) -> list[tuple[str, ...]]:
    reader = model.output_reader(output, [])
    return joined([*[delta for token_id in ids for delta in reader.add([token_id])], *reader.finish()])


def test_channels_are_reasoning_and_content(output: OutputFormat):
    assert read(output, f"{THOUGHT}{NEXT}{FINAL}<|return|>") == [("reasoning", "hm"), ("content", "Yes.")]
    assert read(output, f"{FINAL}<|return|>") == [("content", "Yes.")]
    # It may say that the content is JSON.
    for kind in (" <|constrain|>json", "<|constrain|>json", " json"):
        assert read(output, f"<|channel|>final{kind}<|message|>{{}}<|return|>") == [("content", "{}")]


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.add <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.add<|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.add json<|message|>",
        "<|channel|>commentary to=functions.add<|message|>",
        "<|channel|>commentary to=functions.add code<|message|>",
        " to=functions.add<|channel|>commentary json<|message|>",
        "to=functions.add<|channel|>commentary <|constrain|>json<|message|>",
        "<|channel|>analysis to=functions.add <|constrain|>json<|message|>",
        "<|channel|>analysis to=functions.add code<|message|>",
        " to=functions.add<|channel|>analysis code<|message|>",
    ],
)
def test_a_call_is_read_however_its_header_is_written(output: OutputFormat, header: str):
    for end in ("", "<|call|>", "<|end|>"):
        assert read(output, f'{header}{{"a": 1}}{end}') == [ADD]
        assert read(output, f'{THOUGHT}{NEXT}{header}{{"a": 1}}{end}') == [("reasoning", "hm"), ADD]


def test_names_of_functions_may_hold_the_words_of_headers(output: OutputFormat):
    for name in ("analysis", "final_commentary", "functions.to", "web-search.v2", "assistant"):
        call = CALL.replace("add", name)
        assert read(output, f"{call}<|call|>") == [("call", name, '{"a": 1}')]


def test_preambles_are_content(output: OutputFormat):
    text = f"{THOUGHT}{NEXT}{PREAMBLE}{NEXT}{CALL}<|call|>"
    assert read(output, text) == [("reasoning", "hm"), ("content", "I add."), ADD]


def test_messages_of_one_kind_are_one_text(output: OutputFormat):
    text = f"{THOUGHT}{NEXT}{THOUGHT}{NEXT}{PREAMBLE}{NEXT}{FINAL}<|return|>"
    assert read(output, text) == [("reasoning", "hm\n\nhm"), ("content", "I add.\n\nYes.")]
    text = f"{THOUGHT}{NEXT}{PREAMBLE}{NEXT}{THOUGHT}{NEXT}{FINAL}"
    assert read(output, text) == [("reasoning", "hm"), ("content", "I add."), ("reasoning", "hm"), ("content", "Yes.")]
    empty = f"<|channel|>analysis<|message|>{NEXT}{THOUGHT}{NEXT}<|channel|>final<|message|>"
    assert read(output, empty) == [("reasoning", "hm")]


def test_several_calls_of_one_answer(output: OutputFormat):
    assert read(output, f"{CALL}{NEXT}{CALL}<|call|>") == [ADD, ADD]
    assert read(replace(output, only_one_call=True), f"{CALL}{NEXT}{CALL}<|call|>") == [ADD]


@pytest.mark.parametrize("recipient", ["browser.search", "python", "container.exec", "assistant", "functions"])
def test_messages_to_others_are_shown_to_nobody(output: OutputFormat, recipient: str):
    for header in (
        f"<|channel|>analysis to={recipient} code<|message|>",
        f" to={recipient}<|channel|>final<|message|>",
    ):
        assert read(output, f"{header}secret<|call|>") == []
        assert read(output, f"{header}secret{NEXT}{FINAL}") == [("content", "Yes.")]


def test_without_tools_calls_are_shown_to_nobody(model: ChatTokenizer, output: OutputFormat):
    without = replace(output, markers=model.markers(None), tool_format=None)
    assert read(without, f"{THOUGHT}{NEXT}{CALL}<|call|>") == [("reasoning", "hm")]


@pytest.mark.parametrize(
    "broken", ["<|channel|>??", "<|channel|>commentary 2?", "<|channel|>commentary to=functions.add"]
)
def test_a_header_that_breaks_off_is_no_message(output: OutputFormat, broken: str):
    """gpt-oss does that now and then at temperature 1 (llama.cpp#27720)."""
    assert read(output, f"{broken}{NEXT}{THOUGHT}{NEXT}{FINAL}") == [("reasoning", "hm"), ("content", "Yes.")]
    doubled = f"{broken}<|channel|>commentary?{NEXT}{FINAL}"
    assert read(output, doubled) == [("content", "Yes.")]


def test_a_channel_inside_a_message_begins_another(output: OutputFormat):
    assert read(output, f"{THOUGHT}{FINAL}") == [("reasoning", "hm"), ("content", "Yes.")]
    assert read(output, "<|message|>Yes.") == [("content", "Yes.")]


def test_an_answer_may_end_anywhere(output: OutputFormat):
    text = shown(f"{THOUGHT}{NEXT}{PREAMBLE}{NEXT}{CALL}<|call|>")
    arguments_at = text.index("{")
    for length in range(len(text)):
        parts: dict[str, str] = {"reasoning": "", "content": ""}
        calls = []
        for part in parsed(output, *text[:length]):
            if part[0] == "call":
                calls.append(part)
            else:
                parts[part[0]] = part[1]
        assert "hm".startswith(parts["reasoning"]) and "I add.".startswith(parts["content"])
        assert calls == ([("call", "add", text[arguments_at:length])] if length >= arguments_at else [])


def test_a_call_without_arguments_has_an_empty_object(output: OutputFormat):
    call = "<|channel|>commentary to=functions.now<|message|>"
    assert read(output, f"{call}<|call|>") == read(output, f"{call}{{}}<|call|>") == [("call", "now", "{}")]
    assert read(output, f"{call} \n<|call|>") == [("call", "now", "{}")]
    assert read(output, call) == [("call", "now", "")]  # it was cut


def test_arguments_come_as_they_are_written(model: ChatTokenizer, output: OutputFormat):
    reader = model.output_reader(output, [])
    pieces = [reader.add([token_id]) for token_id in model.encode_prompt(f"{CALL}<|call|>", add_special_tokens=False)]
    assert sum(bool(piece) for piece in pieces) > 3
    assert joined([delta for piece in pieces for delta in piece]) == [ADD]


def test_a_stop_string_ends_content_alone(output: OutputFormat):
    said, of_stop = "<|channel|>final<|message|>one STOP two", CALL.replace("1", '"STOP"')
    text = f"<|channel|>analysis<|message|>STOP{NEXT}{of_stop}{NEXT}{said}"
    call = ("call", "add", '{"a": "STOP"}')
    assert read(output, text, stop=["STOP"]) == [("reasoning", "STOP"), call, ("content", "one ")]
    assert read(output, f"{PREAMBLE}{NEXT}{FINAL}", stop=["dd.", "X"]) == [("content", "I a")]
    # What is between messages the model did not write.
    assert read(output, f"{PREAMBLE}{NEXT}{FINAL}", stop=["\n\n"]) == [("content", "I add.\n\nYes.")]
    assert read(output, f"{PREAMBLE}{NEXT}{FINAL}", stop=["add.Z"]) == [("content", "I add.\n\nYes.")]


def test_an_answer_may_go_on_with_the_prompt_s_content(output: OutputFormat):
    assert read(replace(output, first=CONTENT), " brown fox<|return|>") == [("content", " brown fox")]


# -- token by token --------------------------------------------------------------------------------------------------


def test_an_answer_may_spell_the_tokens_out(model: ChatTokenizer, output: OutputFormat):
    spelled = "Messages end in <|end|>, a header is <|start|>assistant<|channel|>final<|message|>."
    as_text = [token_id for char in spelled for token_id in model.encode_prompt(char, add_special_tokens=False)]
    headers = [model.encode_prompt(text, add_special_tokens=False) for text in (THOUGHT[:-2], NEXT, FINAL[:-4])]
    ids = [*headers[0], *as_text, *headers[1], *headers[2], *as_text, model.stop_token_ids[-1]]
    assert by_tokens(model, output, ids) == [("reasoning", spelled), ("content", spelled)]


def test_reasoning_tokens_are_counted(model: ChatTokenizer, output: OutputFormat):
    reader = model.output_reader(output, [])
    thought = model.encode_prompt("hm, 🦊 hm", add_special_tokens=False)
    header, rest = (model.encode_prompt(text, add_special_tokens=False) for text in (THOUGHT[:-2], f"{NEXT}{FINAL}"))
    deltas = [*reader.add([*header, *thought, *rest]), *reader.finish()]
    assert joined(deltas) == [("reasoning", "hm, 🦊 hm"), ("content", "Yes.")]
    assert reader.num_reasoning_tokens == len(thought) + 2  # with the marks around it
    assert reader.num_tokens == len(header) + len(thought) + len(rest)


def test_a_character_that_a_message_ends_in_is_left_out(model: ChatTokenizer, output: OutputFormat):
    half = model.encode_prompt("🦊", add_special_tokens=False)[:-1]
    ids = [
        *model.encode_prompt(THOUGHT, add_special_tokens=False), *half,
        *model.encode_prompt(f"{NEXT}{FINAL}", add_special_tokens=False),
    ]  # fmt: skip
    assert by_tokens(model, output, ids) == [("reasoning", "hm"), ("content", "Yes.")]


def test_both_ends_of_an_answer_end_it_whatever_the_folder_says(model: ChatTokenizer):
    assert set(model.encode_prompt("<|return|><|call|>", add_special_tokens=False)) <= set(model.stop_token_ids)


def test_a_model_with_the_tokens_and_another_template_speaks_something_else(tiny_chat_model: Path, tmp_path: Path):
    other = template_model(tiny_chat_model, tmp_path, QWEN3, special=TOKENS)
    assert not other.template.is_harmony and other.first_part is None and not other.can_think


FRAGMENTS = [
    *TOKENS, THOUGHT, FINAL, PREAMBLE, CALL, NEXT, "analysis", "final", "commentary", " to=", "functions.", "python",
    "assistant", " ", "\n", "text", "é🦊", "{", '"}', "STOP", "ST", "<|", "|>",
]  # fmt: skip


@settings(deadline=None)  # the machine's other work is no part of it
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=16),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    stop=st.sampled_from([(), ("STOP",), ("\n ", "STOP")]),
    only_one=st.booleans(),
)
def test_where_the_text_is_cut_never_matters(
    output: OutputFormat, fragments: list[str], cuts: list[int], stop: tuple[str, ...], only_one: bool
):
    output = replace(output, only_one_call=only_one)
    text = shown("".join(fragments))
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    whole = parsed(output, text, stop=stop)
    assert parsed(output, *pieces, stop=stop) == parsed(output, *text, stop=stop) == whole
    for _, *texts in whole:
        "".join(texts).encode()  # what stands for a token is in none of them


@settings(deadline=None)  # the machine's other work is no part of it
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=16),
    steps=st.lists(st.integers(1, 9), max_size=9),
)
def test_how_many_tokens_a_step_has_never_matters(
    model: ChatTokenizer, output: OutputFormat, fragments: list[str], steps: list[int]
):
    ids = model.encode_prompt("".join(fragments), add_special_tokens=False)
    reader, rest, deltas = model.output_reader(output, []), ids, []
    for step in steps:
        deltas += reader.add(rest[:step])
        rest = rest[step:]
    deltas += [*reader.add(rest), *reader.finish()]
    assert joined(deltas) == by_tokens(model, output, ids)
    assert reader.num_tokens == len(ids)
