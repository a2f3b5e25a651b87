"""How many tokens of prompts go between two steps of the running sequences: a pure function of measured times.

A trade: while a prompt is read, the streams' gap between tokens grows to so many times the usual one, and the prompt
gets the rest of the time. Without streams, more chunks fill the pipeline better but each costs a pass over the weights.
"""

from __future__ import annotations

import math

from server.grouping import period_seconds
from server.step_times import Line, StepTimes

GAP_FACTOR = 2.5  # a prompt being read slows streams down to this many times their usual gap, and gets 60 % of the time
MAX_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS = 16
FIRST_STEP_SECONDS = 0.5  # nobody's first token waits longer than so for prompts that came with its own
UNMEASURED_CHUNK_TOKENS = 128  # small enough to learn from it soon
LOGPROBS_CHUNK_TOKENS = 128  # of a frame whose logits are all needed: with a vocabulary of 256k 128 MiB in float32


def chunk_tokens_beside_streams(num_rows: int, num_groups: int, num_stages: int, steps: StepTimes, line: Line) -> int:
    """Tokens of prefill in one lap that stretch the gap of `num_rows` streams to GAP_FACTOR times the usual one.

    In a lap every stage computes the chunk and each group once. With fewer groups than stages, a group also waits
    behind a chunk on every stage of its way.
    """
    if not steps.is_known:
        return UNMEASURED_CHUNK_TOKENS
    period = period_seconds(num_rows, num_groups, steps)
    step = steps.stage_seconds(num_groups, -(-num_rows // num_groups))
    seconds = GAP_FACTOR * period - num_groups * max(step)
    if num_groups < num_stages:
        seconds = min(seconds, (GAP_FACTOR * period - max(step)) / (num_stages - 1))
    return _clamped((seconds - line.fixed) / line.per_token, line)


def chunk_tokens_alone(num_tokens: int, num_stages: int, line: Line) -> int:
    """Tokens of each chunk that read a prompt of `num_tokens` soonest while nothing else runs.

    C chunks take (C + P - 1) · (fixed + per_token · N / C), least at C = sqrt((P - 1) · per_token · N / fixed).
    """
    if num_stages == 1:
        return MAX_CHUNK_TOKENS
    fixed = max(line.fixed, line.per_token)  # no pass is free, whatever the fit says
    num_chunks = math.sqrt((num_stages - 1) * line.per_token * num_tokens / fixed)
    return _clamped(num_tokens / max(1.0, num_chunks), line)


def tokens_before_first_step(line: Line | None) -> int:
    """Tokens of prompts that came together to read before the first of them goes on to decode."""
    if line is None:
        return UNMEASURED_CHUNK_TOKENS
    return int(min(FIRST_STEP_SECONDS / line.per_token, MAX_CHUNK_TOKENS))


def in_even_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """The next chunk of `num_tokens`, so that the last one is not a pass over all weights for a few tokens."""
    return -(-num_tokens // -(-num_tokens // chunk_tokens))


def _clamped(num_tokens: float, line: Line) -> int:
    """Within the limits, and no chunk so small that most of its time is the fixed part."""
    least = max(MIN_CHUNK_TOKENS, line.fixed / line.per_token)
    return int(min(max(num_tokens, least), MAX_CHUNK_TOKENS))
