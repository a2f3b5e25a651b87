"""Grammars of running sequences: nothing but what fits is ever allowed, and what breaks, breaks one sequence alone."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from pydantic import BaseModel, ConfigDict, Field

from api.structured.grammar import json_object, json_schema
from server.grammar import Grammars
from server.grammar_compiler import UnusableGrammar
from server.protocol import SamplingParams
from tests.grammars import PROMPT, Answer, decoded, num_tokens, token_id_of
from tests.tiny_chat_model import END_OF_TEXT, END_OF_TURN, START_OF_TURN, VOCAB_SIZE


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or random answers would never end


class Wheel(Closed):
    spokes: int = Field(ge=0, le=40)
    size: float = Field(ge=0.5, le=30)


class Bicycle(Closed):
    name: str = Field(max_length=8)
    colour: Colour
    wheels: list[Wheel] = Field(max_length=2)
    owner: str | None = Field(default=None, max_length=5)
    code: str = Field(pattern="^[A-Z]{2}-[0-9]{1,3}$")


BICYCLE = json_schema(Bicycle.model_json_schema(), strict=None, param="schema")
LETTERS = 'start: /[a-f]{3}/ | "x" /[0-9]+/'

Begin = Callable[..., Answer]


@pytest.fixture(scope="module")
def grammars(tiny_chat_model: Path) -> Grammars:
    return Grammars(tiny_chat_model, VOCAB_SIZE)


@pytest.fixture(scope="module")
def stop_ids(tiny_chat_model: Path) -> list[int]:
    return [token_id_of(tiny_chat_model, END_OF_TURN), token_id_of(tiny_chat_model, END_OF_TEXT)]


@pytest.fixture(scope="module")
def begin(grammars: Grammars, stop_ids: list[int]) -> Begin:
    """Admit a sequence, by a number that no other has, and read its prompt."""
    numbers = iter(range(10_000))

    def admit(grammar: str, *, seed: int = 0) -> Answer:
        answer = Answer(grammars, next(numbers), grammar, stop_ids, seed=seed)
        answer.read_prompt()
        return answer

    return admit


def test_any_allowed_tokens_make_json_of_the_schema(begin: Begin, tiny_chat_model: Path):
    for seed in range(30):
        Bicycle.model_validate_json(decoded(tiny_chat_model, begin(BICYCLE, seed=seed).run()))


def test_json_is_written_in_one_line_with_a_space_after_separators_or_none(begin: Begin, tiny_chat_model: Path):
    items = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3}
    schema = {"type": "object", "properties": {"a": {"const": "b"}, "c": items}, "required": ["a", "c"]}
    grammar = json_schema(schema | {"additionalProperties": False}, strict=True, param="schema")
    texts = {decoded(tiny_chat_model, begin(grammar, seed=seed).run()) for seed in range(20)}
    assert len(texts) > 10
    for text in texts:
        compact = json.dumps(json.loads(text), separators=(",", ":"))
        assert text.replace(", ", ",").replace(": ", ":") == compact


def test_an_answer_may_end_by_any_of_its_stop_ids_when_it_is_complete_and_not_before(
    begin: Begin, tiny_chat_model: Path, stop_ids: list[int]
):
    answer = begin("start: /[ab]{3}/")
    for letter in "aba":
        assert not set(stop_ids) & set(answer.allowed())
        answer.take(token_id_of(tiny_chat_model, letter))
    assert answer.allowed() == sorted(stop_ids)


def test_a_stop_id_that_is_text_cannot_end_an_answer_early(grammars: Grammars, tiny_chat_model: Path):
    comma, brace = token_id_of(tiny_chat_model, ","), token_id_of(tiny_chat_model, "}")
    answer = Answer(grammars, -5, 'start: "{" /[a,]{0,5}/ "}" /b{0,2}/', [comma, brace])
    answer.read_prompt()
    answer.take(token_id_of(tiny_chat_model, "{"))
    allowed = answer.allowed()
    assert comma not in allowed and brace not in allowed and token_id_of(tiny_chat_model, "a") in allowed


def test_neither_special_tokens_nor_padding_are_ever_allowed_as_text(begin: Begin, tiny_chat_model: Path):
    allowed = begin("start: /(.|\\n)+/").allowed()
    assert len(allowed) > 300
    assert max(allowed) < num_tokens(tiny_chat_model) < VOCAB_SIZE
    assert token_id_of(tiny_chat_model, START_OF_TURN) not in allowed


def test_a_special_token_is_allowed_where_the_grammar_names_it(begin: Begin, tiny_chat_model: Path):
    turn = token_id_of(tiny_chat_model, START_OF_TURN)
    answer = begin(f"start: <[{turn}]> /a/")
    assert answer.allowed() == [turn]
    answer.take(turn)
    assert answer.allowed() == [token_id_of(tiny_chat_model, "a")]


def test_a_replay_goes_on_where_the_answer_stopped(
    begin: Begin, grammars: Grammars, tiny_chat_model: Path, stop_ids: list[int]
):
    answer = begin(BICYCLE, seed=3)
    for _ in range(12):
        answer.draw()
    again = Grammars(tiny_chat_model, VOCAB_SIZE)
    for sequence_id, of, cut in ((7, again, 6), (-7, grammars, 11)):  # after a restart, and after a preemption
        replay = Answer(of, sequence_id, BICYCLE, stop_ids)
        history = PROMPT + answer.token_ids
        of.observe(sequence_id, history[:cut])  # in chunks, as a prompt is read
        of.observe(sequence_id, history[cut:])
        assert replay.failure is None
        np.testing.assert_array_equal(replay.mask(), answer.mask())
        replay.run()


def test_tokens_count_once_whether_drawn_or_seen_to_run(grammars: Grammars, tiny_chat_model: Path, stop_ids: list[int]):
    answer = Answer(grammars, -9, "start: /abc/", stop_ids)
    answer.read_prompt()
    for letter in "abc":
        token_id = token_id_of(tiny_chat_model, letter)
        assert answer.allowed() == [token_id]
        grammars.drawn([-9], [token_id])
        assert token_id not in answer.allowed(), "the draw counts before the token runs"
        grammars.observe(-9, [token_id])
    assert answer.allowed() == sorted(stop_ids)


def test_what_ran_counts_where_another_token_was_drawn(grammars: Grammars, tiny_chat_model: Path, stop_ids: list[int]):
    """A preempted sequence may draw one token twice, and not alike; rank 0 keeps the first."""
    answer = Answer(grammars, -11, "start: /ab/ | /cd/", stop_ids)
    answer.read_prompt()
    a, b, c = (token_id_of(tiny_chat_model, letter) for letter in "abc")
    assert answer.allowed() == sorted([a, c])
    grammars.drawn([-11], [c])
    grammars.observe(-11, [a])
    assert answer.allowed() == [b]
    grammars.drawn([-11], [b])
    grammars.observe(-11, [b])
    assert answer.allowed() == sorted(stop_ids)


def test_a_grammar_that_takes_too_long_fails_and_the_others_go_on(
    begin: Begin, grammars: Grammars, monkeypatch: pytest.MonkeyPatch, stop_ids: list[int]
):
    monkeypatch.setattr("server.grammar._LONGEST_WAIT_S", 0.05)
    other = begin(BICYCLE, seed=1)
    monkeypatch.setattr(grammars, "_compile", lambda sequence: None)
    grammars.admit(-13, SamplingParams(grammar=LETTERS), len(PROMPT), stop_ids)
    masks = grammars.bitmasks([other.sequence_id, -13])
    assert masks is not None and (masks[1] == -1).all()
    assert "takes longer" in grammars.failures([-13])[-13]
    assert other.failure is None
    np.testing.assert_array_equal(masks[0], other.mask())
    grammars.forget(-13)


def test_slow_grammars_are_compiled_side_by_side_and_each_sequence_is_ready_when_its_own_is(
    tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch
):
    together = threading.Barrier(2, timeout=10)
    may_end = threading.Event()

    def compiled(tokenizer: LLTokenizer, grammar: str, **options: Any) -> LLMatcher:
        if "slow" in grammar:
            together.wait()  # both of them at once
            assert may_end.wait(10)
        return LLMatcher(tokenizer, grammar, **options)

    monkeypatch.setattr("server.grammar_compiler.LLMatcher", compiled)
    grammars = Grammars(tiny_chat_model, VOCAB_SIZE)
    for sequence_id, grammar in enumerate(["start: /slow a/", "start: /slow b/", "start: /slow b/", "start: /c/"]):
        grammars.admit(sequence_id, SamplingParams(grammar=grammar), len(PROMPT), [])
    grammars.admit(4, SamplingParams(), len(PROMPT), [])
    assert grammars.newly_ready(10) == [3] and grammars.newly_ready() == []
    grammars.forget(2)
    may_end.set()
    ready: list[int] = []
    while len(ready) < 2:
        ready += grammars.newly_ready(10)
    assert sorted(ready) == [0, 1] and grammars.newly_ready(10) == []
    assert grammars.failures(range(5)) == {}


def test_a_request_does_not_wait_for_ever_for_its_grammar(tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    grammars = Grammars(tiny_chat_model, VOCAB_SIZE)
    monkeypatch.setattr(grammars, "_compile", lambda sequence: None)
    grammars.admit(0, SamplingParams(grammar=LETTERS), len(PROMPT), [])
    assert grammars.newly_ready() == []
    monkeypatch.setattr("server.grammar._LONGEST_COMPILING_S", -1.0)
    assert grammars.newly_ready() == [0] and "not compiled" in grammars.failures([0])[0]


def test_a_grammar_that_nobody_wants_any_more_is_not_compiled_until_somebody_does(tiny_chat_model: Path):
    grammars = Grammars(tiny_chat_model, VOCAB_SIZE)
    with grammars._compiler._loading:  # all its threads are busy
        for sequence_id in range(4):
            grammars.admit(sequence_id, SamplingParams(grammar=f"start: /{sequence_id}/"), len(PROMPT), [])
        grammars.admit(4, SamplingParams(grammar=LETTERS), len(PROMPT), [])
        unwanted = grammars._compiler.compile(LETTERS)
        grammars.forget(4)
    with pytest.raises(UnusableGrammar):
        unwanted.result(10)
    answer = Answer(grammars, 5, LETTERS, [1])
    assert answer.failure is None and answer.allowed()


def test_sequences_with_and_without_a_grammar_share_a_batch(begin: Begin, grammars: Grammars):
    answers = [begin(BICYCLE, seed=1), begin(LETTERS)]
    grammars.admit(20_000, SamplingParams(), len(PROMPT), [])
    masks = grammars.bitmasks([answers[0].sequence_id, 20_000, answers[1].sequence_id])
    assert masks is not None and masks.shape == (3, -(-VOCAB_SIZE // 32)) and masks.dtype == np.int32
    assert (masks[1] == -1).all()
    np.testing.assert_array_equal(masks[0], answers[0].mask())
    np.testing.assert_array_equal(masks[2], answers[1].mask())
    assert grammars.bitmasks([20_000]) is None
    grammars.drawn([20_000], [5])
    grammars.forget(20_000)


def test_answers_to_one_grammar_go_ways_of_their_own(begin: Begin, tiny_chat_model: Path):
    answers = [begin(BICYCLE, seed=seed) for seed in range(6)]
    grammars = answers[0].grammars
    running = list(answers)
    while running:  # all in one batch, as n choices of one request
        grammars.bitmasks([answer.sequence_id for answer in running])
        running = [answer for answer in running if answer.draw() not in answer.stop_ids]
    texts = {decoded(tiny_chat_model, answer.token_ids[:-1]) for answer in answers}
    assert len(texts) == len(answers)
    for text in texts:
        Bicycle.model_validate_json(text)


@pytest.mark.parametrize(
    "broken",
    [
        "start: (",
        "start: nobody",
        'start: %json {"type": "string", "pattern": "(?=a)b"}',
        "start: <[100000]>",
        'start: %json {"type": "string", "minLength": 500, "maxLength": 1000, "format": "email"}',
    ],
)
def test_a_broken_or_too_large_grammar_fails_its_own_sequence_alone(begin: Begin, broken: str):
    good, bad = begin(BICYCLE, seed=2), begin(broken)
    good.draw()
    masks = good.grammars.bitmasks([bad.sequence_id, good.sequence_id])
    assert masks is not None and (masks[0] == -1).all()
    failures = good.grammars.failures([bad.sequence_id, good.sequence_id])
    assert list(failures) == [bad.sequence_id]
    assert failures[bad.sequence_id].startswith("The grammar of this request cannot be followed: ")
    assert len(failures[bad.sequence_id]) < 400
    bad.take(5)  # what the sampler drew for it
    good.run()


def test_an_answer_that_goes_too_far_takes_none_with_it_that_shares_its_grammar(
    tiny_chat_model: Path, stop_ids: list[int]
):
    grammars = Grammars(tiny_chat_model, VOCAB_SIZE, LLParserLimits(max_lexer_states=200))
    a, x = (token_id_of(tiny_chat_model, letter) for letter in "ax")
    modest, greedy = (Answer(grammars, number, "start: /a{0,20}/ | /x{0,1000}/", stop_ids) for number in (1, 2))
    modest.take(a)
    while greedy.failure is None:  # each x is a state of the lexer that they share
        greedy.take(x)
        greedy.mask()
    assert 20 < len(greedy.token_ids) < 200
    later = Answer(grammars, 3, "start: /a{0,20}/ | /x{0,1000}/", stop_ids)
    for answer in (modest, later):
        answer.take(a)
        assert a in answer.allowed() and answer.failure is None


def test_a_drawn_token_that_the_grammar_does_not_allow_fails_the_sequence(begin: Begin, tiny_chat_model: Path):
    answer = begin(BICYCLE)
    answer.take(token_id_of(tiny_chat_model, "z"))
    answer.mask()
    assert answer.failure is not None


def test_without_a_usable_tokenizer_requests_with_a_grammar_fail_and_say_so(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}}}')
    grammars = Grammars(tmp_path, 64)
    answer = Answer(grammars, 0, LETTERS, [1])
    assert (answer.mask() == -1).all()
    assert answer.failure is not None and "tokenizer" in answer.failure


def test_tokens_that_only_the_configuration_knows_are_special(
    tiny_chat_model: Path, tmp_path: Path, stop_ids: list[int]
):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_chat_model / file, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    new_id = num_tokens(tiny_chat_model)
    config.setdefault("added_tokens_decoder", {})[str(new_id)] = {"content": "<tool_call>", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    answer = Answer(Grammars(tmp_path, VOCAB_SIZE), 0, "start: /.+/ <tool_call>", stop_ids)
    assert new_id not in answer.allowed(), "it is no text"
    answer.take(token_id_of(tiny_chat_model, "a"))
    assert new_id in answer.allowed()


def test_a_model_with_fewer_columns_than_tokens_draws_what_it_can(tiny_chat_model: Path, stop_ids: list[int]):
    columns = num_tokens(tiny_chat_model) - 100
    answer = Answer(Grammars(tiny_chat_model, columns), 0, json_object(), stop_ids)
    answer.take(token_id_of(tiny_chat_model, "{"))
    answer.take(token_id_of(tiny_chat_model, '"'))
    assert len(answer.mask()) == -(-columns // 32) and max(answer.allowed()) < columns


def test_the_vocabulary_is_there_before_it_is_needed_where_it_was_warmed(tiny_chat_model: Path, stop_ids: list[int]):
    grammars = Grammars(tiny_chat_model, VOCAB_SIZE)
    grammars.warm()
    assert Answer(grammars, 0, "start: /a/", stop_ids).allowed() == [token_id_of(tiny_chat_model, "a")]
