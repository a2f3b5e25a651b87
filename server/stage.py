"""One rank's part of a step: change the caches as the frame says, run the layers, on the last rank sample.

The same code on every rank and for every ring size. It evaluates what it returns, so that only evaluated arrays reach
the data plane; it holds no policy and knows no neighbours. Rank 0's engine and the other ranks' worker loop call it
from their one compute thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from distributed.shard.message import pack_message, unpack_message
from distributed.shard.stage_model import StageModel
from server.frame import Admit, Frame, Header, Leave, ResultHeader, StepHeader
from server.kv_budget import RankCost
from server.kv_cache import KVCacheStore, measure_cost
from server.sampler import Sampler


class Stage:
    """The layers of one rank, their caches, and on the last rank the sampler.

    Args:
        model: the loaded stage.
    """

    def __init__(self, model: StageModel) -> None:
        self._model = model
        self.caches = KVCacheStore(model.make_cache, can_batch=model.can_batch)
        dry_output, dry_caches = model.dry_run()
        self.cache_cost: RankCost = measure_cost(dry_caches, can_batch=model.can_batch)
        self._sampler = Sampler(dry_output.shape[-1]) if model.is_last else None

    def run(self, header: StepHeader, arrays: Sequence[mx.array]) -> tuple[Header, list[mx.array]]:
        """Run one frame.

        Args:
            header: the frame, and the structure of the message from the stage upstream.
            arrays: token ids (rows, tokens) int32, then the message's arrays; none for a frame without rows.

        Returns:
            Header and evaluated arrays for the right neighbour: the next stage's, or on the last rank the result.
        """
        frame = header.frame
        self.caches.apply(frame.operations)
        self._tell_sampler(frame)
        if not frame.rows:
            self.caches.count_bytes()
            return (ResultHeader(frame.frame_id) if self._model.is_last else header), []
        token_ids, *incoming = arrays
        message = None if self._model.is_first else unpack_message(header.message, incoming)
        batch = self.caches.batch_for(frame, token_ids.shape[1])
        output = self._model(token_ids, message, batch.caches)
        if self._model.is_last:
            structure, outgoing = None, self._sample(frame, token_ids, output)
        else:
            outgoing, structure = pack_message(output)
        mx.eval(outgoing, [cache.state for cache in batch.caches])
        self.caches.count_bytes()
        if frame.group_id is None:
            mx.clear_cache()  # a chunk's temporaries are far larger than a decode step's
        if self._model.is_last:
            return ResultHeader(frame.frame_id), outgoing
        return StepHeader(frame, structure), [token_ids, *outgoing]

    def _tell_sampler(self, frame: Frame) -> None:
        if self._sampler is None:
            return
        for operation in frame.operations:
            match operation:
                case Admit(sequence_id=sequence_id, sampling=sampling, num_prompt_tokens=num_prompt_tokens):
                    self._sampler.admit(sequence_id, sampling, num_prompt_tokens)
                case Leave(sequence_ids=sequence_ids):
                    for sequence_id in sequence_ids:
                        self._sampler.forget(sequence_id)

    def _sample(self, frame: Frame, token_ids: mx.array, logits: mx.array) -> list[mx.array]:
        """The next token of each row of a decode frame, (rows,); nothing for a prefill frame: its logits stay lazy."""
        assert self._sampler is not None
        sequence_ids = [row.sequence_id for row in frame.rows]
        if self._sampler.wants_tokens(sequence_ids):
            rows: list[list[int]] = token_ids.tolist()  # type: ignore[assignment]
            for sequence_id, row in zip(sequence_ids, rows, strict=True):
                self._sampler.observe(sequence_id, row)
        if frame.group_id is None:
            return []
        # The token drawn after `length` cached ones has that index.
        return [self._sampler.sample(logits[:, -1, :], sequence_ids, [row.length for row in frame.rows])]
