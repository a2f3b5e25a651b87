"""What a frame gave each of its rows: the last rank's tensors, as lists, taken apart.

`server.frame.ResultHeader` says what they hold and in which order; who wants what is in each sequence's sampling
parameters, so the last rank and rank 0 agree without saying so. Pure; the scheduler is its only caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, repeat
from typing import Any, NamedTuple

from server.frame import Row
from server.protocol import TokenLogprobs
from server.sequence import Sequence

LOWEST_LOGPROB = -9999.0  # as in OpenAI's reference

Scored = Iterator[tuple[float, list[int], list[float]]]  # logprob of a token, the likeliest ids and their logprobs


class RowResult(NamedTuple):
    """`token_id` is None in a prefill frame. `prompt_logprobs` are of the prompt's tokens from `prompt_start` on."""

    token_id: int | None
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    prompt_start: int


def row_results(rows: list[tuple[Sequence, Row]], tensors: list[list[Any]], *, has_drawn: bool) -> list[RowResult]:
    """One for each of `rows`; `has_drawn`: it was a decode frame."""
    token_ids, scored_tensors = (tensors[0], tensors[1:]) if has_drawn else ([None] * len(rows), tensors)
    if not scored_tensors:
        return [RowResult(token_id, [], [], 0) for token_id in token_ids]
    scored = _scored(*scored_tensors)
    prompts = []
    for sequence, row in rows:
        indexes = row.prompt_indexes(sequence.num_prompt_tokens)
        logprobs = _take(scored, len(indexes), sequence.submit.sampling.prompt_logprobs)
        prompts.append((logprobs, indexes.start if logprobs else 0))
    drawn = [_take(scored, int(has_drawn), sequence.submit.sampling.logprobs) for sequence, _ in rows]
    return [
        RowResult(token_id, logprobs, *prompt)
        for token_id, logprobs, prompt in zip(token_ids, drawn, prompts, strict=True)
    ]


def _scored(
    logprobs: list[float], top_ids: list[list[int]] | None = None, top_logprobs: list[list[float]] | None = None
) -> Scored:
    return zip(logprobs, top_ids or repeat([]), top_logprobs or repeat([]), strict=False)


def _take(scored: Scored, num_tokens: int, num_top: int | None) -> list[TokenLogprobs]:
    """The next `num_tokens`, each with as many of the likeliest as the request wants; None: it wants none at all."""
    if num_top is None:
        return []
    taken = islice(scored, num_tokens)
    return [
        TokenLogprobs(_finite(logprob), ids[:num_top], [_finite(top) for top in logprobs[:num_top]])
        for logprob, ids, logprobs in taken
    ]


def _finite(logprob: float) -> float:
    """JSON has no infinity; what a model gives -inf or no number is as unlikely as can be."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
