from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from api.output.text import Finder, TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_model: Path) -> TokenizerWrapper:
    return load(tiny_chat_model)


def stream_of(tokenizer: TokenizerWrapper) -> TextStream:
    return TextStream(tokenizer.detokenizer)


def ids_of(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "text", ["hello world", "a  b\n\n c", "Grüße, 世界! 👩‍👩‍👧 é", "tab\tand \\ backslash", "🦊" * 5]
)
def test_text_comes_out_of_the_ids_as_it_went_in(tokenizer: TokenizerWrapper, text: str):
    stream = stream_of(tokenizer)
    assert "".join(stream.add(token_id) for token_id in ids_of(tokenizer, text)) + stream.finish() == text


def test_a_character_of_several_tokens_is_never_shown_in_halves(tokenizer: TokenizerWrapper):
    ids = ids_of(tokenizer, "🦊")
    assert len(ids) > 1
    stream = stream_of(tokenizer)
    assert [stream.add(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🦊"]


def test_a_character_that_never_became_whole_is_left_out(tokenizer: TokenizerWrapper):
    ids = ids_of(tokenizer, "ok 🦊")
    stream = stream_of(tokenizer)
    assert "".join(map(stream.add, ids[:-1])) + stream.finish() == "ok "


def test_text_is_held_back_only_while_it_may_begin_a_string():
    finder = Finder(["\n\nUser:"])
    assert finder.add("a\n") == "a"
    assert finder.add("\nUs") == ""
    assert finder.add("age") == "\n\nUsage"
    assert finder.add("\n\n") == ""
    assert finder.rest() == "\n\n"


def test_the_first_of_several_strings_is_found():
    finder = Finder(["zebra", "bc", "abc", "abcz"])
    assert finder.add("xxabczebra") == "xx"
    assert finder.found == "abc"
    assert finder.add(" more") == ""
    assert finder.rest() == "zebra more"


@given(
    text=st.text("ab", max_size=40),
    strings=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
def test_where_the_text_is_cut_never_matters(text: str, strings: list[str], cuts: list[int]):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    finder = Finder(strings)
    before = "".join(finder.add(text[start:end]) for start, end in pairwise(borders))
    rest = finder.rest()
    matches = [(text.find(string) + len(string), text.find(string), string) for string in strings if string in text]
    if matches:
        end, start, found = min(matches)
        assert (before, finder.found, rest) == (text[:start], found, text[end:])
    else:
        assert (before + rest, finder.found) == (text, None)
