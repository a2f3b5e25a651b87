import math
from typing import Any

import pytest

from api.errors import InvalidRequest
from api.sampling import sampling_params
from api.schemas.chat import ChatCompletionRequest
from api.tokenizer import SamplingDefaults
from config import Settings
from server.protocol import SamplingParams


def chat(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatCompletionRequest.model_validate(body)


def params(model: SamplingDefaults | None = None, settings: Settings | None = None, **fields: Any) -> SamplingParams:
    request = chat(**fields)
    return sampling_params(request, settings or Settings(), model or SamplingDefaults(), vocab_size=100)


def test_a_request_that_says_nothing_samples_as_openai_does():
    assert params(seed=1) == SamplingParams(temperature=1.0, seed=1)


def test_the_request_wins_over_the_settings_and_those_over_the_model():
    model = SamplingDefaults(temperature=0.3, top_p=0.7, top_k=20, repetition_penalty=1.1)
    settings = Settings(default_temperature=0.5, default_top_p=0.8)
    assert params(model).temperature == 0.3
    assert params(model, settings).temperature == 0.5
    assert params(model, settings, temperature=0).temperature == 0
    assert params(model, settings).top_p == 0.8
    assert params(model, settings, top_p=0.9).top_p == 0.9
    assert params(model).top_k == 20
    assert params(model, top_k=0).top_k == 0
    assert params(model).repetition_penalty == 1.1
    assert params(model, repetition_penalty=1).repetition_penalty == 1


def test_a_seed_is_kept_and_one_is_drawn_where_none_is_given():
    assert params(seed=5).seed == 5
    assert params(seed=-1).seed == 2**64 - 1
    assert params().seed != params().seed


def test_a_top_p_of_zero_leaves_one_token():
    sampling = params(top_p=0)
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_logit_bias_is_for_tokens_of_the_vocabulary():
    assert params(logit_bias={"99": -100, "0": 5.5}).logit_bias == {99: -100, 0: 5.5}
    with pytest.raises(InvalidRequest, match="token id 100") as raised:
        params(logit_bias={"100": 1})
    assert raised.value.param == "logit_bias"


def test_what_is_banned_is_so_whatever_the_request_says():
    request = chat(logit_bias={"7": 100, "8": 1})
    made = sampling_params(request, Settings(), SamplingDefaults(), vocab_size=100, banned_ids=[7, 100])
    assert made.logit_bias == {7: -math.inf, 8: 1}
