"""What a request, the settings and the model say about sampling, put together.

A pure function over plain data: the request wins over DEFAULT_TEMPERATURE and DEFAULT_TOP_P, those over the model's
generation_config.json, that over the neutral value. Called once for each request.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection
from typing import TypeVar

from api.errors import InvalidRequest
from api.schemas.base import SamplingFields
from api.tokenizer import SamplingDefaults
from config import Settings
from server.protocol import SamplingParams

T = TypeVar("T")

SEED_BITS = 64


def sampling_params(
    request: SamplingFields,
    settings: Settings,
    model: SamplingDefaults,
    vocab_size: int,
    *,
    grammar: str | None = None,
    banned_ids: Collection[int] = (),
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The parameters the ring samples with. A request that names no seed gets one here, so a replay draws the same.
    `banned_ids` are not drawn, whatever `logit_bias` says; a tokenizer may have more tokens than the model.

    Raises InvalidRequest for a logit_bias of a token that the model does not have, and where `ignore_eos` would keep
    an answer from ending that a grammar ends.
    """
    if grammar is not None and request.ignore_eos:
        message = (
            "'ignore_eos' cannot be used where a grammar says what the answer is (response_format, tools; with gpt-oss "
            "also reasoning_effort 'none')."
        )
        raise InvalidRequest(message, param="ignore_eos", code="invalid_value")
    top_p = _first(request.top_p, settings.default_top_p, model.top_p, 1.0)
    top_k = _first(request.top_k, model.top_k, 0)
    if top_p == 0:  # the smallest set of tokens there is, but samplers read 0 as "off"
        top_p, top_k = 1.0, 1
    seed = secrets.randbits(SEED_BITS - 1) if request.seed is None else request.seed % 2**SEED_BITS
    return SamplingParams(
        temperature=_first(request.temperature, settings.default_temperature, model.temperature, 1.0),
        top_p=top_p,
        top_k=top_k,
        min_p=_first(request.min_p, model.min_p, 0.0),
        repetition_penalty=_first(request.repetition_penalty, model.repetition_penalty, 1.0),
        presence_penalty=_first(request.presence_penalty, 0.0),
        frequency_penalty=_first(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size)
        | {token_id: -math.inf for token_id in banned_ids if token_id < vocab_size},
        seed=seed,
        min_tokens=request.min_tokens or 0,
        grammar=grammar,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _first(*values: T | None) -> T:
    """The first that is given; the last always is."""
    return next(value for value in values if value is not None)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    for name in bias:
        if int(name) >= vocab_size:
            message = f"Invalid 'logit_bias': token id {name} is not in the model's vocabulary of {vocab_size} tokens."
            raise InvalidRequest(message, param="logit_bias", code="invalid_value")
    return {int(name): value for name, value in bias.items()}
