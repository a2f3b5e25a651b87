"""One throw-away request through the whole ring before the first real one, as rank 0.

It proves that frames go round and that a token can be sampled. On a Mac it is given a whole chunk, which compiles
Metal's kernels and allocates what the first real chunk would (gigabytes more than the next one, oMLX#3452).
"""

from __future__ import annotations

import mlx.core as mx

from distributed.pipeline import Pipeline
from server.frame import Admit, Frame, Join, Leave, Row, StepHeader, encode_header
from server.protocol import SamplingParams
from server.stage import Stage

_SEQUENCE_ID = -1
NUM_TOKENS = 8


def warm_up(stage: Stage, pipeline: Pipeline, vocab_size: int, num_tokens: int = NUM_TOKENS) -> None:
    """Prefill `num_tokens`, sample one, leave; returns when all three frames came back."""
    admit = Admit(_SEQUENCE_ID, num_tokens, SamplingParams(temperature=0.0))
    prompt = [[token_id % vocab_size for token_id in range(num_tokens)]]
    for frame, token_ids in (
        (Frame(-3, [admit], [Row(_SEQUENCE_ID, num_tokens, num_tokens)], after_idle=True), prompt),
        (Frame(-2, [Join(-1, [_SEQUENCE_ID])], [Row(_SEQUENCE_ID, num_tokens + 1)], group_id=-1), [[0]]),
        (Frame(-1, [Leave([_SEQUENCE_ID])]), []),
    ):
        header, arrays = stage.run(StepHeader(frame), [mx.array(token_ids, dtype=mx.int32)] if token_ids else [])
        pipeline.send(encode_header(header), arrays)
        pipeline.inbox.get()
        pipeline.acknowledge()
