"""Plays rank 0 for the caches of one rank: knows what each sequence holds, and runs tokens through a whole model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from distributed.shard.layer_map import runs_batched
from server.frame import Admit, Drop, Frame, Join, Keep, Leave, Row
from server.kv_cache import KVCacheStore
from server.protocol import SamplingParams


class CacheDriver:
    """`texts`: the tokens that each sequence's caches hold; `kept`: those of each entry."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.store = KVCacheStore(lambda: make_prompt_cache(model), can_batch=runs_batched(model))
        self.texts: dict[int, list[int]] = {}
        self.kept: dict[int, list[int]] = {}

    def admit(
        self, sequence_id: int, entry_id: int | None = None, num_cached: int | None = None, *, takes: bool = False
    ) -> None:
        """A new sequence, empty or from an entry: the whole of it if no number of tokens is given."""
        self.texts[sequence_id] = [] if entry_id is None else self.kept[entry_id][:num_cached]
        num_cached = len(self.texts[sequence_id])
        admit = Admit(sequence_id, num_cached + 1, SamplingParams(), entry_id, num_cached, takes_entry=takes)
        self.store.apply([admit])

    def prefill(self, sequence_id: int, tokens: list[int]) -> None:
        self.admit(sequence_id)
        self.run({sequence_id: tokens})

    def keep(self, entry_id: int, sequence_id: int, *, leaves: bool = False) -> None:
        self.kept[entry_id] = self.texts[sequence_id]
        self.store.apply([Keep(entry_id, sequence_id, len(self.texts[sequence_id]), leaves)])

    def join(self, group_id: int, *sequence_ids: int) -> None:
        self.store.apply([Join(group_id, list(sequence_ids))])

    def run(self, tokens: dict[int, list[int]], group_id: int | None = None) -> dict[int, mx.array]:
        """Run each sequence's next tokens in one frame; gives the logits (vocab_size,) after its last one."""
        width = max(map(len, tokens.values()))
        token_ids = mx.array([new + [0] * (width - len(new)) for new in tokens.values()])
        rows = [Row(i, len(self.texts[i]) + len(new), len(new)) for i, new in tokens.items()]
        with self.store.running(Frame(0, [], rows, group_id)) as caches:
            logits = self.model(token_ids, cache=caches)
            mx.eval(logits, [cache.state for cache in caches])
        for sequence_id, new in tokens.items():
            self.texts[sequence_id] = self.texts[sequence_id] + new
        return {i: logits[row, len(new) - 1] for row, (i, new) in enumerate(tokens.items())}

    def check(self, tokens: dict[int, list[int]], group_id: int | None = None) -> None:
        """Run, and compare with what the model says to each whole text alone."""
        for sequence_id, logits in self.run(tokens, group_id).items():
            text = mx.array([self.texts[sequence_id]])
            expected = self.model(text, cache=make_prompt_cache(self.model))[0, -1]
            error = float(mx.abs(logits - expected).max() / mx.abs(expected).max())
            assert error < 1e-4, f"sequence {sequence_id} after {len(self.texts[sequence_id])} tokens: {error}"

    def end(self) -> None:
        """Every sequence leaves and every entry is dropped."""
        self.store.apply([Leave(list(self.texts)), Drop(list(self.kept))])
