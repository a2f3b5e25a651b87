"""One rank's part of a step: change the caches as the frame says, run the layers, on the last rank draw and score.

The same code on every rank and for every ring size. It evaluates what it returns, so that only evaluated arrays reach
the data plane; it holds no policy and knows no neighbours. Rank 0's engine and the other ranks' worker loop call it
from their one compute thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from distributed.shard.message import StageMessage, pack_message, unpack_message
from distributed.shard.stage_model import StageModel
from server.cache_ops import Cache, arrays_of, measure_cost, uncopyable_class
from server.errors import DisagreementError
from server.frame import Admit, Frame, Header, Keep, Leave, ResultHeader, StepHeader
from server.kv_budget import MIB, RankCost
from server.kv_cache import KVCacheStore
from server.logprobs import Logprobs
from server.quantization import quantized_make_cache
from server.sampler import Sampler

if TYPE_CHECKING:
    from server.grammar import Grammars

logger = logging.getLogger(__name__)

# What MLX may keep of freed buffers, without which a long run on a Mac keeps growing. It has to hold what a decode step
# frees, so that the next one allocates nothing: mostly some float32 copies of the logits (32 rows of 256k: 32 MiB).
# What prefill and rearranged caches free is given back at once.
BUFFER_CACHE_BYTES = 256 * MIB
_GRAMMAR_WAIT_S = 0.02  # a newcomer waits so long at most; without it the ring would do nothing but ask


class Stage:
    """The layers of one rank, their caches, and on the last rank the sampler.

    Args:
        model: the loaded stage.
        kv_cache_bits: 8 or 4 to keep keys and values in so many bits, None to keep them as they are.
        make_grammars: what follows requests' grammars, for logits of a given width; called on the last rank.

    Raises:
        CacheError: this model's caches cannot be quantized.
    """

    def __init__(
        self,
        model: StageModel,
        kv_cache_bits: int | None = None,
        make_grammars: Callable[[int], Grammars] | None = None,
    ) -> None:
        self._model = model
        make_cache = model.make_cache if kv_cache_bits is None else quantized_make_cache(model, kv_cache_bits)
        self.caches = KVCacheStore(make_cache, can_batch=model.can_batch)
        dry_output, dry_caches = model.dry_run(make_cache())
        self.cache_cost: RankCost = measure_cost(
            dry_caches, can_batch=model.can_batch, run=lambda num_tokens: model.dry_run(make_cache(), num_tokens)[1]
        )
        if not self.cache_cost.can_keep:
            unknown = next(filter(None, map(uncopyable_class, dry_caches)))
            logger.info("the prefix cache is off: %s cannot be copied", unknown)
        self._sampler: Sampler | None = None
        self._logprobs = Logprobs()
        if model.is_last:
            vocab_size = dry_output.shape[-1]
            self._sampler = Sampler(vocab_size, make_grammars(vocab_size) if make_grammars else None)
        default_limit = mx.set_cache_limit(BUFFER_CACHE_BYTES)
        mx.set_cache_limit(min(BUFFER_CACHE_BYTES, default_limit))  # the CPU backend's own is 32 MiB

    def run(self, header: StepHeader, arrays: Sequence[mx.array]) -> tuple[Header, list[mx.array]]:
        """Run one frame.

        Args:
            header: the frame, and the structure of the message from the stage upstream.
            arrays: token ids (rows, tokens) int32, then the message's arrays; none for a frame without rows.

        Returns:
            Header and evaluated arrays for the right neighbour: the next stage's, or on the last rank the result. The
            header's `stage_seconds` end with what the rows took here.

        Raises:
            DisagreementError: the frame does not fit this rank's caches.
        """
        frame = header.frame
        self.caches.apply(frame.operations)
        if self._sampler is not None:
            self._tell(self._sampler, frame)
        started = time.perf_counter()
        structure, outgoing = self._run_rows(header, arrays) if frame.rows else (None, [])
        failures: dict[int, str] = {}
        if self._sampler is not None and frame.group_id is not None:
            failures = self._sampler.drawn([row.sequence_id for row in frame.rows], outgoing[0])
        stage_seconds = [*header.stage_seconds, time.perf_counter() - started]
        if self._sampler is not None:
            ready = self._sampler.newly_ready(_GRAMMAR_WAIT_S if frame.awaits_grammar else 0.0)
            return ResultHeader(frame.frame_id, stage_seconds, failures, ready), outgoing
        return StepHeader(frame, structure, stage_seconds), [*arrays[:1], *outgoing]

    def _run_rows(self, header: StepHeader, arrays: Sequence[mx.array]) -> tuple[Any, list[mx.array]]:
        """Structure and evaluated arrays of what this stage gives for the frame's rows."""
        frame = header.frame
        token_ids, *incoming = arrays
        if token_ids.shape != (expected := (len(frame.rows), max(row.num_tokens for row in frame.rows))):
            raise DisagreementError(f"frame {frame.frame_id} has token ids {token_ids.shape} for rows {expected}")
        message = None if self._model.is_first else unpack_message(header.message, incoming)
        with self.caches.running(frame) as caches:
            structure, outgoing = self._forward(frame, token_ids, message, caches)
        if frame.group_id is None:
            mx.clear_cache()  # a chunk's temporaries are far larger than a decode step's
        return structure, outgoing

    def _forward(
        self, frame: Frame, token_ids: mx.array, message: StageMessage | None, caches: list[Cache]
    ) -> tuple[Any, list[mx.array]]:
        """The model's step, evaluated. A function of its own so that nothing lazy is left of it."""
        output = self._model(token_ids, message, caches)
        if self._sampler is not None:
            structure, outgoing = None, self._results(self._sampler, frame, token_ids, output)
        else:
            outgoing, structure = pack_message(output)
        mx.eval(outgoing, [arrays_of(cache) for cache in caches])
        return structure, outgoing

    def _tell(self, sampler: Sampler, frame: Frame) -> None:
        """Who comes and who goes."""
        for operation in frame.operations:
            match operation:
                case Admit(sequence_id=sequence_id, sampling=sampling, num_prompt_tokens=num_prompt_tokens):
                    self._logprobs.admit(sequence_id, sampling, num_prompt_tokens)
                    sampler.admit(sequence_id, sampling, num_prompt_tokens, operation.stop_token_ids)
                    sampler.observe(sequence_id, operation.cached_token_ids)
                case Leave(sequence_ids=sequence_ids):
                    for sequence_id in sequence_ids:
                        self._logprobs.forget(sequence_id)
                        sampler.forget(sequence_id)
                case Keep(sequence_id=sequence_id, leaves=True):
                    self._logprobs.forget(sequence_id)
                    sampler.forget(sequence_id)

    def _results(self, sampler: Sampler, frame: Frame, token_ids: mx.array, logits: mx.array) -> list[mx.array]:
        """What `ResultHeader` tells of. Of a prefill frame of which nobody wants logprobs the logits stay lazy."""
        sequence_ids = [row.sequence_id for row in frame.rows]
        if sampler.wants_tokens(sequence_ids):
            ids: list[list[int]] = token_ids.tolist()  # type: ignore[assignment]
            for row, row_ids in zip(frame.rows, ids, strict=True):
                sampler.observe(row.sequence_id, row_ids[: row.num_tokens])
        drawn = None
        if frame.group_id is not None:
            # The token drawn after `length` cached ones has that index.
            drawn = sampler.sample(logits[:, -1, :], sequence_ids, [row.length for row in frame.rows])
        logprobs = self._logprobs.of_frame(frame, token_ids, logits, drawn)
        return logprobs if drawn is None else [drawn, *logprobs]
