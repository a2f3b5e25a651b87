"""Where tokens begin in a text, for tokenizers of every kind; a table stands for the vocabulary."""

from api.completions.logprobs import LogprobsOfChoice
from api.output.deltas import DrawnToken
from api.schemas.completions import CompletionLogprobs
from server.protocol import TokenLogprobs

WORDS = {
    1: ("<s>", None),
    2: (" one", list(b" one")),
    3: (" two", list(b" two")),
    4: ("\ufffd", [0xE4, 0xB8]),
    5: ("\ufffd", [0x96]),
    6: ("</s>", None),
    7: ("two", list(b"two")),
    8: ("two", list(b"two")),
}


def written(prompt: str, prompt_ids: list[int], *answer: int, num_top: int = 0) -> CompletionLogprobs:
    choice = LogprobsOfChoice(prompt, num_top, WORDS.__getitem__)
    choice.add_prompt(prompt_ids, [TokenLogprobs(-1.0, [8, 3], [-1.0, -2.0])] * (len(prompt_ids) - 1))
    choice.add([DrawnToken(token_id, TokenLogprobs(-0.5, [7, 8], [-0.5, -0.7])) for token_id in answer])
    return choice.take()


def test_a_beginning_that_is_in_no_text_takes_no_place():
    assert written("one two", [1, 2, 3], 3, 6, 3).text_offset == [0, 0, 3, 7, 11, 11]


def test_a_control_token_that_the_prompt_spells_out_takes_its_place():
    assert written("<s> one", [1, 2], 3).text_offset == [0, 3, 7]


def test_parts_of_a_character_begin_where_it_begins():
    assert written(" one世", [2, 4, 5], 4, 5, 3).text_offset == [0, 4, 4, 5, 5, 6]


def test_bytes_that_are_no_text_take_the_place_of_what_they_are_shown_as():
    assert written("", [1], 5, 6, 5, 3).text_offset == [0, 0, 1, 1, 2]  # the answer is "\ufffd\ufffd two"
    assert written("", [1], 4, 3, 3).text_offset == [0, 0, 1, 5]  # "\ufffd two two"


def test_the_likelier_of_two_tokens_with_one_text_is_named_and_the_token_itself_always():
    logprobs = written(" one", [2], 3, 7, num_top=2)
    assert logprobs.top_logprobs == [None, {"two": -0.5, " two": -0.5}, {"two": -0.5}]


def test_no_more_alternatives_than_asked_for_are_given():
    assert written(" one", [2], 3, num_top=1).top_logprobs[1] == {"two": -0.5, " two": -0.5}
    assert written(" one", [2], 3).top_logprobs[1] == {" two": -0.5}


def test_what_was_taken_is_not_given_again():
    choice = LogprobsOfChoice("", 0, WORDS.__getitem__)
    choice.add([DrawnToken(2, TokenLogprobs(-0.5))])
    assert choice.take().tokens == [" one"]
    choice.add([DrawnToken(3, TokenLogprobs(-0.5))])
    second = choice.take()
    assert (second.tokens, second.text_offset) == ([" two"], [4])
