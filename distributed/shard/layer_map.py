"""Which decoder layer of a model uses which entry of its cache, learned from one dry run of its own forward.

The dry run happens on a copy whose weights are zeros that take no memory, so no weight is read and the model does not
change. `plan_stage` turns what was learned into what one stage holds and sends; `StageModel` follows that plan.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from distributed.errors import ModelError
from distributed.partition import LayerRange
from distributed.shard.caches import CacheTap, cache_kind
from distributed.shard.hooks import decoder_layers, hook_layers, shared_dicts
from distributed.shard.message import StageMessage, pack_message, unpack_message

# Architectures that mlx-lm computes wrongly, without an error, for the shorter sequences of a batch.
WRONG_IN_BATCHES = {
    "mlx_lm.models.afm7",  # places queries at the padded length
    "mlx_lm.models.minimax_m3_vl",  # cuts its sparse blocks by the place in the cache, padding counted
}


@dataclass(frozen=True)
class StagePlan:
    """What one stage holds and sends, in terms of the entries of the whole model's cache.

    `held`: the entries whose caches the stage keeps, ascending: its own, replicas and phantoms.
    `cache_slots`: for every entry of the model, the position in `held` of the cache that stands for it here.
    `replicas`: a layer before the stage -> its entry, which layers of this stage read.
    `phantoms`: positions in `held` of caches that no layer here fills, each the only one of its kind.
    `sends`: entries whose new keys and values stages downstream need.
    `example_message`: numbers of rows and tokens -> what arrives for them, but zeros; None on the first stage.
    """

    held: tuple[int, ...]
    cache_slots: tuple[int, ...]
    replicas: dict[int, int]
    phantoms: tuple[int, ...]
    sends: tuple[int, ...]
    example_message: Callable[[int, int], StageMessage] | None


def plan_stage(model: nn.Module, layer_range: LayerRange) -> StagePlan:
    """The plan of the stage that runs `layer_range` of `model`, which has no hooks yet. Evaluates no weight.

    Raises:
        ModelError: the model's forward cannot be cut.
    """
    run = _DryRun(model)
    kinds = [cache_kind(cache) for cache in make_prompt_cache(model)]
    # An entry that no layer uses serves the embeddings (longcat_flash_ngram).
    owners = [run.owner.get(entry, 0) for entry in range(len(kinds))]
    replicas = {
        owners[entry]: entry
        for entry, readers in run.readers.items()
        if owners[entry] < layer_range.start and any(reader in layer_range for reader in readers)
    }
    held = {entry for entry, owner in enumerate(owners) if owner in layer_range} | set(replicas.values())
    phantoms: list[int] = []
    for entry, kind in enumerate(kinds):
        if all(kinds[other] != kind for other in held):
            phantoms.append(entry)
            held.add(entry)
    order = sorted(held)
    slot_of_kind = [next(slot for slot, entry in enumerate(order) if kinds[entry] == kind) for kind in kinds]
    return StagePlan(
        held=tuple(order),
        cache_slots=tuple(order.index(e) if e in held else slot for e, slot in enumerate(slot_of_kind)),
        replicas=replicas,
        phantoms=tuple(order.index(entry) for entry in phantoms),
        sends=run.entries_across(layer_range.end),
        example_message=partial(run.example_message, layer_range.start) if layer_range.start else None,
    )


class _DryRun:
    """Tokens through a weightless copy of the model, watched layer by layer.

    `owner`: cache entry -> the layer that fills it; `readers`: entry -> the other layers that read it.
    """

    def __init__(self, model: nn.Module):
        self.owner: dict[int, int] = {}
        self.readers: defaultdict[int, set[int]] = defaultdict(set)
        self._boundary: int | None = None  # the layer whose output is kept
        self._calls: list[int] = []
        self._message: StageMessage | None = None

        self._skeleton = _weightless_copy(model)
        layers = decoder_layers(self._skeleton)
        hook_layers(layers, self._visit)
        self._run(num_rows=1, num_tokens=1)
        if self._calls != list(range(len(layers))):
            raise ModelError(
                f"the model class {type(model).__module__} does not call each of its {len(layers)} layers once and in "
                "order, so it cannot be cut into stages; run it on one rank (RING_SIZE=1, no WORKER_HOSTS)"
            )

    def _run(self, num_rows: int, num_tokens: int) -> None:
        cache = make_prompt_cache(self._skeleton)
        with CacheTap(dict(enumerate(cache))) as self._tap:
            _run(self._skeleton, mx.zeros((num_rows, num_tokens), mx.int32), cache)
        del self._tap  # it holds the whole graph

    def _visit(self, index: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._calls.append(index)
        for entry in self._tap.entries_read((args, kwargs)):
            if self.owner.setdefault(entry, index) != index:
                self.readers[entry].add(index)
        output = run(*args, **kwargs)
        if index == self._boundary:
            self._message = StageMessage(
                self._tap.without_cache_contents(output), dict(self._tap.new_kv), shared_dicts(args, kwargs)
            )
        return output

    def entries_across(self, layer: int) -> tuple[int, ...]:
        """Entries filled before `layer` that it or a later one reads."""
        return tuple(sorted(e for e, readers in self.readers.items() if self.owner[e] < layer <= max(readers)))

    def example_message(self, start: int, num_rows: int, num_tokens: int) -> StageMessage:
        """What the layer before `start` gives, with zeros in it."""
        self._boundary = start - 1
        self._run(num_rows, num_tokens)
        message, self._message = self._message, None
        assert message is not None
        new_kv = {entry: message.new_kv[entry] for entry in self.entries_across(start)}
        arrays, structure = pack_message(StageMessage(message.output, new_kv, message.shared))
        return unpack_message(structure, [mx.zeros(array.shape, array.dtype) for array in arrays])


def runs_batched(model: nn.Module) -> bool:
    """Whether mlx-lm runs `model`, which has no hooks yet, rightly on sequences of different lengths at once.

    Some caches have no `merge` (llama4), some forwards stumble over the masks or offsets of several sequences (gemma2,
    gpt_bigcode). Three rows, because a mask of as many rows as there are heads would pass unnoticed, and wrong.
    Evaluates no weight.
    """
    if type(model).__module__ in WRONG_IN_BATCHES:
        return False
    cache = make_prompt_cache(model)
    try:
        batched = [type(c).merge([c, copy.deepcopy(c), copy.deepcopy(c)]) for c in cache]
        _run(_weightless_copy(model), mx.zeros((3, 1), mx.int32), batched)
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _weightless_copy(model: nn.Module) -> nn.Module:
    skeleton = copy.deepcopy(model)
    skeleton.update(tree_map(lambda w: mx.broadcast_to(mx.zeros((), w.dtype), w.shape), skeleton.parameters()))
    return skeleton


def _run(skeleton: nn.Module, token_ids: mx.array, cache: list[Any]) -> None:
    try:
        skeleton(token_ids, cache=cache)
    except RuntimeError as error:  # as of a kernel that only Metal has (bitnet)
        raise ModelError(f"{type(skeleton).__module__} does not run on this machine: {error}") from error
