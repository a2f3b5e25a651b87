"""Real rings of 2 and 3 processes: logprobs of answers and prompts against the unsplit model, min_tokens, grammars."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from server.protocol import SamplingParams, TokenLogprobs
from tests.ring_harness import RingUnderTest, running_ring

pytestmark = pytest.mark.ring

PROMPTS = {"long": [(i * 7 + 3) % 500 for i in range(300)], "short": [5, 6, 7, 8], "one": [11], "chunk": [9] * 17}
MAX_TOKENS = 12
TOLERANCE = 1e-3


@dataclass
class Answer:
    """All that came of one request; every token of the prompt must be scored before the first one is drawn."""

    num_prompt_tokens: int
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


def answers(ring: RingUnderTest, prompts: dict[str, list[int]], **options: Any) -> dict[str, Answer]:
    """Submit all at once; what each got. Every option is a dict with a value for each request (and maybe others)."""
    given: dict[str, Answer] = {}
    for name, prompt in prompts.items():
        of_request = {option: values[name] for option, values in options.items()}
        ring.submit(name, prompt, of_request.pop("max_tokens", MAX_TOKENS), **of_request)
        given[name] = Answer(len(prompt), of_request["sampling"])
    for output in ring.outputs(len(prompts)):
        assert output.finish_reason != "error", output.error
        answer = given[output.request_id]
        answer.prompt_logprobs |= dict(enumerate(output.prompt_logprobs, output.prompt_logprobs_start))
        if output.token_ids and answer.sampling.prompt_logprobs is not None:
            assert list(answer.prompt_logprobs) == list(range(1, answer.num_prompt_tokens))
        answer.tokens += output.token_ids
        answer.logprobs += output.logprobs
    return given


class Model:
    """The unsplit one."""

    def __init__(self, folder: Path) -> None:
        model, self.tokenizer = load(str(folder))[:2]
        self._model: Any = model

    def check(self, prompt: list[int], answer: Answer) -> None:
        tokens = [*prompt, *answer.tokens]
        logits = np.array(self._model(mx.array([tokens]))[0].astype(mx.float32), np.float64)
        likely = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        wanted = answer.sampling
        assert len(answer.logprobs) == (0 if wanted.logprobs is None else len(answer.tokens))
        for index, given in enumerate(answer.logprobs, len(prompt)):
            _check(given, likely[index - 1], tokens[index], wanted.logprobs or 0)
        assert len(answer.prompt_logprobs) == (0 if wanted.prompt_logprobs is None else len(prompt) - 1)
        for index, given in answer.prompt_logprobs.items():
            _check(given, likely[index - 1], tokens[index], wanted.prompt_logprobs or 0)


def _check(given: TokenLogprobs, likely: np.ndarray, token_id: int, num_top: int) -> None:
    assert given.logprob == pytest.approx(likely[token_id], abs=TOLERANCE)
    assert len(given.top_ids) == num_top
    assert given.top_logprobs == pytest.approx(likely[given.top_ids].tolist(), abs=TOLERANCE)
    assert given.top_logprobs == pytest.approx(sorted(likely, reverse=True)[:num_top], abs=TOLERANCE)


@pytest.fixture(scope="module")
def model(tiny_chat_model: Path) -> Model:
    return Model(tiny_chat_model)


@pytest.fixture(scope="module", params=[2, 3], ids="P={}".format)
def ring(request: pytest.FixtureRequest, tiny_chat_model: Path):
    with running_ring(tiny_chat_model, request.param, prefill_chunk_tokens=16) as ring:
        ring.wait_ready()
        yield ring


def test_every_request_of_a_batch_gets_the_logprobs_that_the_unsplit_model_gives(ring: RingUnderTest, model: Model):
    changed = {"logit_bias": {17: 3.0}, "frequency_penalty": 1.5, "repetition_penalty": 1.3}
    sampling = {
        "long": SamplingParams(temperature=0, logprobs=5, prompt_logprobs=2),
        "short": SamplingParams(temperature=1.3, seed=3, logprobs=0, prompt_logprobs=0, **changed),
        "one": SamplingParams(temperature=0.7, seed=4, top_k=5, logprobs=20, prompt_logprobs=20, **changed),
        "chunk": SamplingParams(temperature=0),
    }
    given = answers(ring, PROMPTS, sampling=sampling)
    for name, prompt in PROMPTS.items():
        assert len(given[name].tokens) == MAX_TOKENS
        model.check(prompt, given[name])


def test_a_prompt_that_was_read_before_is_scored_all_the_same(ring: RingUnderTest, model: Model):
    prompt = {"again": PROMPTS["long"]}
    answers(ring, prompt, sampling={"again": SamplingParams(temperature=0)})
    given = answers(ring, prompt, sampling={"again": SamplingParams(temperature=0, prompt_logprobs=1)})
    model.check(prompt["again"], given["again"])


def test_a_replayed_request_is_scored_from_its_prompt_on(ring: RingUnderTest, model: Model):
    prompts = {"replayed": PROMPTS["long"]}
    sampling = {"replayed": SamplingParams(temperature=1, seed=5, logprobs=1, prompt_logprobs=1)}
    whole = answers(ring, prompts, sampling=sampling)["replayed"]
    rest = answers(ring, prompts, sampling=sampling, output_token_ids={"replayed": whole.tokens[:7]})["replayed"]
    assert rest.tokens == whole.tokens[7:]
    rest.tokens, rest.logprobs = whole.tokens, [*whole.logprobs[:7], *rest.logprobs]
    model.check(prompts["replayed"], rest)


def test_no_stop_id_is_drawn_before_min_tokens(ring: RingUnderTest):
    plain = {"plain": SamplingParams(temperature=0)}
    tokens = answers(ring, {"plain": PROMPTS["short"]}, sampling=plain)["plain"].tokens
    stops = tokens[:3]
    prompts = {"at once": PROMPTS["short"], "late": PROMPTS["short"]}
    given = answers(
        ring,
        prompts,
        sampling={"at once": SamplingParams(temperature=0), "late": SamplingParams(temperature=0, min_tokens=6)},
        stop_token_ids=dict.fromkeys(prompts, stops),
    )
    assert given["at once"].tokens == tokens[:1]
    late = given["late"].tokens
    assert len(late) >= 6 and not set(late[:6]) & set(stops)
    assert len(late) == MAX_TOKENS or late[-1] in stops


def test_answers_follow_their_grammars_among_others_and_after_a_replay(ring: RingUnderTest, model: Model):
    stops = sorted(model.tokenizer.eos_token_ids)
    plain = SamplingParams(temperature=1, seed=1)
    digits = SamplingParams(temperature=1, seed=2, grammar="start: /[0-9]{6}/", logprobs=1)
    words = SamplingParams(temperature=1, seed=3, grammar='start: "yes" | "no"', min_tokens=20)
    alone = answers(ring, {"plain": [5, 6, 7]}, sampling={"plain": plain})["plain"]
    sampling = {"plain": plain, "digits": digits, "words": words}
    prompts = {name: [5, 6, 7] for name in sampling}
    given = answers(
        ring,
        prompts,
        sampling=sampling,
        max_tokens=dict.fromkeys(prompts, 30),
        stop_token_ids=dict.fromkeys(prompts, stops),
    )
    assert given["plain"].tokens[:MAX_TOKENS] == alone.tokens
    for name, pattern in {"digits": "[0-9]{6}", "words": "yes|no"}.items():
        *text, last = given[name].tokens
        assert last in stops and re.fullmatch(pattern, model.tokenizer.decode(text))
    model.check(prompts["digits"], given["digits"])
    for num_tokens in (1, 3):
        replayed = answers(
            ring,
            {"digits": prompts["digits"]},
            sampling=sampling,
            max_tokens={"digits": 30},
            stop_token_ids={"digits": stops},
            output_token_ids={"digits": given["digits"].tokens[:num_tokens]},
        )
        assert replayed["digits"].tokens == given["digits"].tokens[num_tokens:]


def test_a_grammar_that_is_none_ends_its_request_with_an_error_and_no_other(ring: RingUnderTest):
    ring.submit("beside", [5, 6, 7], 30)
    ring.submit("broken", [5, 6, 7], 30, sampling=SamplingParams(temperature=0, grammar="start: ("))
    ends = {output.request_id: output for output in ring.outputs(2) if output.finish_reason}
    assert ends["broken"].finish_reason == "error" and "grammar" in (ends["broken"].error or "")
    assert ends["beside"].finish_reason == "length"


def test_what_nobody_could_serve_is_refused_and_the_ring_goes_on(ring: RingUnderTest):
    wrong = {
        "min_tokens": SamplingParams(min_tokens=6),
        "prompt_logprobs": SamplingParams(prompt_logprobs=-1),
        "logprobs": SamplingParams(logprobs=100_000),
        "grammar": SamplingParams(grammar="g" * 3_000_000),
    }
    for name, sampling in wrong.items():
        ring.submit(name, [1, 2], 5, sampling=sampling)
    errors = {output.request_id: output for output in ring.outputs(len(wrong))}
    assert all(errors[name].finish_reason == "error" and name in (errors[name].error or "") for name in wrong)
    ring.submit("after", [1, 2], 3)
    assert len(ring.collect("after")["after"]) == 3
