"""Raw prompts on real rings: what is scored and sampled is what unsplit mlx-lm says, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load

from tests.conftest import StartServer

pytestmark = pytest.mark.ring

PROMPTS = ["one two three four five", "The quick brown fox", "hello"]


Complete = Callable[..., Any]


@pytest.fixture(scope="module", params=[1, 2], ids=lambda size: f"{size} ranks")
def complete(request: pytest.FixtureRequest, running_server: StartServer) -> Complete:
    """The SDK's call."""
    server = running_server(RING_SIZE=request.param)
    return partial(server.client().completions.create, model=server.model)


@pytest.fixture(scope="module")
def reference(tiny_chat_model: Path) -> Any:
    """mlx-lm's logprobs of each token of a text after its first."""
    model, tokenizer, *_ = load(str(tiny_chat_model))

    def logprobs(token_ids: list[int]) -> list[float]:
        logits = model(mx.array([token_ids]))[0, :-1].astype(mx.float32)
        scored = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        of_tokens: Any = mx.take_along_axis(scored, mx.array(token_ids[1:])[:, None], axis=-1)[:, 0].tolist()
        return of_tokens

    return logprobs, tokenizer


def test_prompts_are_scored_as_mlx_lm_scores_them(complete: Complete, reference: Any):
    logprobs, tokenizer = reference
    completion = complete(prompt=PROMPTS, echo=True, logprobs=5, max_tokens=0)
    for prompt, choice in zip(PROMPTS, completion.choices, strict=True):
        token_ids = tokenizer.encode(prompt)
        assert choice.text == prompt
        first, *others = choice.logprobs.token_logprobs
        assert first is None
        assert others == pytest.approx(logprobs(token_ids), abs=1e-3)
        assert "".join(choice.logprobs.tokens) == prompt
    assert completion.usage.completion_tokens == 0


def test_every_answer_to_a_prompt_has_the_scores_of_its_one_reading(complete: Complete, reference: Any):
    logprobs, tokenizer = reference
    text = " ".join(f"word {number}" for number in range(60))
    expected = logprobs(tokenizer.encode(text))
    options: dict[str, Any] = {"prompt": text, "n": 3, "logprobs": 1, "max_tokens": 4, "seed": 5}
    answers = [choice.text for choice in complete(**options).choices]
    completion = complete(**options, echo=True)
    assert [choice.text for choice in completion.choices] == [text + answer for answer in answers]
    for choice in completion.choices:
        assert choice.logprobs.token_logprobs[1 : len(expected) + 1] == pytest.approx(expected, abs=1e-3)


def test_an_answer_is_scored_as_mlx_lm_scores_it_under_temperature_and_bias(complete: Complete, reference: Any):
    logprobs, tokenizer = reference
    completion = complete(
        prompt=PROMPTS[0], echo=True, logprobs=1, max_tokens=8, temperature=1.5, seed=3,
        logit_bias={str(tokenizer.encode(" two")[0]): 2},
    )  # fmt: skip
    (choice,) = completion.choices
    token_ids = [*tokenizer.encode(PROMPTS[0])]
    num_sampled = completion.usage.completion_tokens
    assert len(choice.logprobs.tokens) == len(token_ids) + num_sampled
    vocabulary = {tokenizer.decode([token_id]): token_id for token_id in range(len(tokenizer))}
    sampled = [vocabulary.get(token) for token in choice.logprobs.tokens[len(token_ids) :]]
    known = sampled[: sampled.index(None)] if None in sampled else sampled  # part of a character: the text has no name
    expected = logprobs([*token_ids, *known])
    assert choice.logprobs.token_logprobs[1 : len(expected) + 1] == pytest.approx(expected, abs=1e-3)


def test_answers_are_the_same_alone_and_among_others(complete: Complete):
    options: dict[str, Any] = {"max_tokens": 12, "seed": 11}
    together = complete(prompt=PROMPTS, n=3, **options)
    alone = [complete(prompt=prompt, n=3, **options) for prompt in PROMPTS]
    assert [choice.text for choice in together.choices] == [choice.text for one in alone for choice in one.choices]
    assert len({choice.text for choice in alone[0].choices}) > 1


def test_the_best_of_several_answers_are_those_with_the_highest_logprob(complete: Complete):
    options: dict[str, Any] = {
        "prompt": PROMPTS[1], "max_tokens": 6, "seed": 1, "logprobs": 0, "temperature": 2,
    }  # fmt: skip
    every = complete(n=5, **options).choices
    best = complete(n=2, best_of=5, **options).choices

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(every, key=mean, reverse=True)
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]
