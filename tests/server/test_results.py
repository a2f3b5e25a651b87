"""What a frame gave its rows, taken apart."""

from __future__ import annotations

import json
import math

import pytest

from server.frame import Row
from server.protocol import SamplingParams, Submit
from server.results import LOWEST_LOGPROB, row_results
from server.sequence import Sequence


@pytest.mark.parametrize("logprob", [-math.inf, math.nan])
def test_a_logprob_that_is_no_number_is_the_lowest_one(logprob: float):
    submit = Submit("a", [1, 2], SamplingParams(logprobs=1), 4, True, [])
    rows = [(Sequence(0, submit), Row(0, 2))]
    (result,) = row_results(rows, [[7], [logprob], [[7]], [[logprob]]], has_drawn=True)
    (given,) = result.logprobs
    assert (result.token_id, given.logprob, given.top_logprobs) == (7, LOWEST_LOGPROB, [LOWEST_LOGPROB])
    assert json.dumps(given.logprob, allow_nan=False)
