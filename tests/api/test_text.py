from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from api.text import StopStrings, TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_model: Path) -> TokenizerWrapper:
    return load(tiny_chat_model)


def stream_of(tokenizer: TokenizerWrapper, *stop: str) -> TextStream:
    return TextStream(tokenizer.detokenizer, stop, frozenset(tokenizer.all_special_ids))


def ids_of(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "text", ["hello world", "a  b\n\n c", "Grüße, 世界! 👩‍👩‍👧 é", "tab\tand \\ backslash", "🦊" * 5]
)
def test_text_comes_out_of_the_ids_as_it_went_in(tokenizer: TokenizerWrapper, text: str):
    stream = stream_of(tokenizer)
    assert "".join(stream.add([token_id]) for token_id in ids_of(tokenizer, text)) + stream.finish() == text


def test_a_character_of_several_tokens_is_never_shown_in_halves(tokenizer: TokenizerWrapper):
    ids = ids_of(tokenizer, "🦊")
    assert len(ids) > 1
    stream = stream_of(tokenizer)
    assert [stream.add([token_id]) for token_id in ids] == [""] * (len(ids) - 1) + ["🦊"]


def test_a_character_that_never_became_whole_is_left_out(tokenizer: TokenizerWrapper):
    ids = ids_of(tokenizer, "ok 🦊")
    stream = stream_of(tokenizer)
    assert stream.add(ids[:-1]) + stream.finish() == "ok "


def test_special_tokens_are_no_text(tokenizer: TokenizerWrapper):
    stream = stream_of(tokenizer)
    ids = [*ids_of(tokenizer, "one"), tokenizer.eos_token_id, *ids_of(tokenizer, " two")]
    assert stream.add(ids) + stream.finish() == "one two"
    assert stream.num_tokens == len(ids)


def test_nothing_after_a_stop_string_is_taken_or_counted(tokenizer: TokenizerWrapper):
    before, after = ids_of(tokenizer, "one two STOP"), ids_of(tokenizer, " three")
    stream = stream_of(tokenizer, "STOP")
    assert stream.add([*before, *after]) == "one two "
    assert stream.stopped
    assert stream.num_tokens == len(before)
    assert stream.finish() == ""


def test_a_stop_string_is_found_across_the_borders_of_tokens(tokenizer: TokenizerWrapper):
    ids = ids_of(tokenizer, "question: fox? answer")
    stream = stream_of(tokenizer, "x? an")
    pieces = [stream.add([token_id]) for token_id in ids]
    assert "".join(pieces) == "question: fo"
    assert stream.stopped


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    stop = StopStrings(["\n\nUser:"])
    assert stop.add("a\n") == "a"
    assert stop.add("\nUs") == ""
    assert stop.add("age") == "\n\nUsage"
    assert stop.add("\n\n") == ""
    assert stop.rest() == "\n\n"


def test_the_first_of_several_stop_strings_ends_the_text():
    stop = StopStrings(["zebra", "bc", "abc", "abcz"])
    assert stop.add("xxabczebra") == "xx"
    assert stop.found
    assert stop.add("more") == ""
    assert stop.rest() == ""


@given(
    text=st.text("ab", max_size=40),
    strings=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
def test_where_the_text_is_cut_never_matters(text: str, strings: list[str], cuts: list[int]):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop = StopStrings(strings)
    shown = "".join(stop.add(text[start:end]) for start, end in pairwise(borders)) + stop.rest()
    matches = [(text.find(string) + len(string), text.find(string)) for string in strings if string in text]
    assert stop.found == bool(matches)
    assert shown == (text[: min(matches)[1]] if matches else text)
