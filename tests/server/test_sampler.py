"""The sampler against plain numpy, and its promise: the same noise alone, in a batch, and after a restart."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from server.protocol import SamplingParams
from server.sampler import Sampler

VOCAB = 64


def sampler_with(*params: SamplingParams, prompt: tuple[int, ...] = (1, 2)) -> Sampler:
    sampler = Sampler(VOCAB)
    for sequence_id, one in enumerate(params):
        sampler.admit(sequence_id, one, len(prompt))
        sampler.observe(sequence_id, list(prompt))
    return sampler


def draw(sampler: Sampler, logits: np.ndarray, positions: list[int] | None = None) -> list[int]:
    rows = list(range(len(logits)))
    return sampler.sample(mx.array(logits.astype(np.float32)), rows, positions or [2] * len(rows)).tolist()  # type: ignore[return-value]


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)) * 2


def support(params: SamplingParams, logits: np.ndarray, draws: int = 400) -> set[int]:
    """Every token that `draws` positions give."""
    sampler = sampler_with(params)
    return {draw(sampler, logits[None], [position])[0] for position in range(draws)}


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-9])
def test_no_temperature_takes_the_likeliest(temperature: float):
    logits = random_logits(3)
    params = [SamplingParams(temperature=temperature)] * 3 + [SamplingParams()]
    assert draw(sampler_with(*params), np.vstack([logits, logits[:1]]))[:3] == logits.argmax(-1).tolist()


def test_a_draw_depends_on_seed_and_position_only_not_on_the_batch():
    logits = random_logits(1)[0]
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(6)]
    together = draw(sampler_with(*params), np.stack([logits] * 6), [9] * 6)
    alone = [draw(sampler_with(one), logits[None], [9])[0] for one in params]
    assert together == alone
    assert len(set(together)) > 1


def test_greedy_and_sampled_rows_share_a_batch():
    logits = random_logits(2)
    mixed = draw(sampler_with(SamplingParams(temperature=0), SamplingParams(temperature=0.8, seed=3)), logits)
    assert mixed[0] == logits[0].argmax()
    alone = Sampler(VOCAB)
    alone.admit(1, SamplingParams(temperature=0.8, seed=3), 2)
    assert mixed[1] == alone.sample(mx.array(logits[1:].astype(np.float32)), [1], [2]).item()


def test_samples_follow_the_distribution():
    logits = np.full(VOCAB, -30.0)
    logits[[3, 5]] = np.log([0.25, 0.75])
    sampler = sampler_with(*[SamplingParams(seed=seed) for seed in range(1000)])
    drawn = draw(sampler, np.stack([logits] * 1000))
    assert set(drawn) == {3, 5}
    assert 0.70 < drawn.count(5) / 1000 < 0.80  # five standard deviations are 0.07


def test_top_k_keeps_the_k_likeliest():
    logits = random_logits(1)[0]
    expected = set(np.argsort(-logits)[:4].tolist())
    assert support(SamplingParams(temperature=3.0, top_k=4), logits) == expected


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = np.full(VOCAB, -50.0)
    logits[[10, 20, 30, 40]] = np.log([0.5, 0.3, 0.15, 0.05])
    assert support(SamplingParams(top_p=0.79), logits) == {10, 20}
    assert support(SamplingParams(top_p=0.81), logits) == {10, 20, 30}


def test_top_p_counts_the_mass_of_what_top_k_left():
    logits = np.full(VOCAB, -50.0)
    logits[[10, 20, 30, 40]] = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the two that top_k keeps, the first has 4/7 of the mass.
    assert support(SamplingParams(top_k=2, top_p=0.5), logits) == {10}


def test_min_p_is_relative_to_the_likeliest():
    logits = np.full(VOCAB, -50.0)
    logits[[10, 20, 30]] = np.log([0.6, 0.3, 0.1])
    assert support(SamplingParams(min_p=0.4), logits) == {10, 20}


def test_logit_bias_is_added_before_the_choice():
    logits = random_logits(2)
    biased = SamplingParams(temperature=0, logit_bias={17: 100.0})
    assert draw(sampler_with(biased, SamplingParams(temperature=0)), logits) == [17, int(logits[1].argmax())]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_banned_token_is_never_drawn(temperature):
    logits = np.full((1, VOCAB), -50.0)
    logits[0, [1, 20]] = [50.0, 1.0]
    banned = SamplingParams(
        temperature=temperature,
        logit_bias={1: -np.inf},
        repetition_penalty=1.2,
        presence_penalty=-2.0,
        frequency_penalty=-2.0,
        top_p=0.9,
    )
    assert draw(sampler_with(banned), logits) == [20]


@pytest.mark.parametrize("sign", [1, -1])
def test_repetition_penalty_counts_prompt_and_output_and_knows_the_sign(sign):
    logits = np.full(VOCAB, -9.0)
    logits[1], logits[3] = sign * 2.0 + 3 * (sign < 0), sign * 2.0 + 3 * (sign < 0) - 0.1  # 1 is in the prompt
    penalized = SamplingParams(temperature=0, repetition_penalty=1.2)
    assert draw(sampler_with(penalized), logits[None]) == [3]
    assert draw(sampler_with(SamplingParams(temperature=0)), logits[None]) == [1]


PRESENCE = SamplingParams(temperature=0, presence_penalty=0.5)
FREQUENCY = SamplingParams(temperature=0, frequency_penalty=0.5)


@pytest.mark.parametrize("params", [PRESENCE, FREQUENCY])
def test_presence_and_frequency_penalties_count_the_output_only(params):
    logits = np.zeros(VOCAB)
    logits[1], logits[4], logits[5] = 1.0, 0.9, 0.8
    sampler = sampler_with(params)
    assert draw(sampler, logits[None]) == [1]  # token 1 was in the prompt: not counted
    sampler.observe(0, [1])
    assert draw(sampler, logits[None]) == [4]
    sampler.observe(0, [4])
    assert draw(sampler, logits[None]) == [5]


def test_frequency_penalty_grows_with_each_repetition_and_presence_does_not():
    logits = np.zeros(VOCAB)
    logits[1], logits[4] = 1.0, 0.1
    for params, expected in ((PRESENCE, 1), (FREQUENCY, 4)):
        sampler = sampler_with(params)
        sampler.observe(0, [1, 1])
        assert draw(sampler, logits[None]) == [expected]


def test_a_resumed_sequence_is_penalized_as_if_it_had_never_stopped():
    logits = random_logits(1)[0]
    params = SamplingParams(temperature=0.7, seed=11, frequency_penalty=0.9, repetition_penalty=1.3)
    straight = sampler_with(params, prompt=(1, 2))
    for token in (8, 9, 8):
        straight.observe(0, [token])
    resumed = Sampler(VOCAB)
    resumed.admit(0, params, 2)
    resumed.observe(0, [1, 2, 8, 9])
    resumed.observe(0, [8])
    assert draw(straight, logits[None], [5]) == draw(resumed, logits[None], [5])


# -- what may not be drawn -------------------------------------------------------------------------------------------

GRAMMAR = SamplingParams(temperature=0, grammar="…")
STOPS = [6, 7, VOCAB + 5]  # a tokenizer may name ids that the model does not have


class SetGrammars:
    """In the place of `server.grammar.Grammars`: what a sequence may draw, and what is wrong with it."""

    def __init__(self, allowed: dict[int, set[int]], broken: dict[int, str] | None = None) -> None:
        self.allowed, self.broken = allowed, broken or {}
        self.calls: list[Any] = []

    def admit(self, *arguments: Any) -> None:
        self.calls.append(("admit", *arguments))

    def forget(self, *arguments: Any) -> None:
        self.calls.append(("forget", *arguments))

    def observe(self, *arguments: Any) -> None:
        self.calls.append(("observe", *arguments))

    def drawn(self, *arguments: Any) -> None:
        self.calls.append(("drawn", *arguments))

    def bitmasks(self, sequence_ids: list[int]) -> np.ndarray:
        words = np.full((len(sequence_ids), VOCAB // 32), -1, np.int32)
        for row, sequence_id in enumerate(sequence_ids):
            if sequence_id in self.allowed:
                bits = [token_id in self.allowed[sequence_id] for token_id in range(VOCAB)]
                words[row] = np.packbits(bits, bitorder="little").view(np.int32)
        return words

    def failures(self, sequence_ids: list[int]) -> dict[int, str]:
        return {sequence_id: why for sequence_id, why in self.broken.items() if sequence_id in sequence_ids}


def masked(grammars: SetGrammars, *params: SamplingParams) -> Sampler:
    sampler = Sampler(VOCAB, grammars)  # type: ignore[arg-type]
    for sequence_id, one in enumerate(params):
        sampler.admit(sequence_id, one, 2, STOPS)
    return sampler


def test_only_what_the_grammar_allows_is_drawn_greedily_or_not_and_other_rows_do_not_notice():
    logits = random_logits(1)[0]
    sampled = SamplingParams(temperature=2.0, seed=4, grammar="…", top_k=50, min_p=0.01)
    biased = SamplingParams(temperature=0, grammar="…", logit_bias={3: 100.0})
    sampler = masked(SetGrammars({0: {5, 40, 63}, 1: {31, 32}, 3: {9, 10}}), GRAMMAR, sampled, SamplingParams(), biased)
    free = Sampler(VOCAB)
    free.admit(2, SamplingParams(), 2)
    seen = set()
    for position in range(2, 200):
        drawn = draw(sampler, np.stack([logits] * 4), [position] * 4)
        assert drawn[0] == max((5, 40, 63), key=lambda token_id: logits[token_id])
        assert drawn[1] in (31, 32) and drawn[3] in (9, 10)
        assert drawn[2] == free.sample(mx.array(logits[None].astype(np.float32)), [2], [position]).item()
        seen.add(drawn[1])
    assert seen == {31, 32}


def test_stop_ids_are_not_drawn_before_min_tokens_and_may_be_from_then_on():
    logits = np.zeros(VOCAB)
    logits[[6, 7, 8]] = 3.0, 2.0, 1.0
    sampler = masked(SetGrammars({}), SamplingParams(temperature=0, min_tokens=3), SamplingParams(temperature=0))
    drawn = [draw(sampler, np.stack([logits] * 2), [position] * 2) for position in range(2, 7)]
    assert drawn == [[8, 6], [8, 6], [8, 6], [6, 6], [6, 6]], "position 2 is the first after a prompt of 2"


def test_a_grammar_that_allows_nothing_but_the_end_may_end_before_min_tokens():
    short = SamplingParams(temperature=0, grammar="…", min_tokens=9)
    sampler = masked(SetGrammars({0: {6, 9}, 1: {7}}), short, short)
    logits = np.zeros(VOCAB)
    logits[6] = 5.0
    assert draw(sampler, np.stack([logits] * 2)) == [9, 7]


def test_grammars_hear_of_tokens_and_say_who_cannot_go_on():
    grammars = SetGrammars({0: {5}}, broken={2: "it grew too large"})
    sampler = masked(grammars, GRAMMAR, SamplingParams(), GRAMMAR)
    params = (GRAMMAR, SamplingParams(), GRAMMAR)
    assert grammars.calls == [("admit", index, one, 2, [6, 7]) for index, one in enumerate(params)]
    grammars.calls.clear()
    assert sampler.wants_tokens([1, 2]) and not sampler.wants_tokens([1])
    sampler.observe(0, [1, 2])
    sampler.observe(1, [1, 2])
    assert sampler.drawn([2, 1], mx.array([5, 6])) == {2: "it grew too large"}
    assert sampler.drawn([1], mx.array([6])) == {}
    sampler.forget(0)
    assert grammars.calls == [("observe", 0, [1, 2]), ("drawn", [2, 1], [5, 6]), ("forget", 0)]
