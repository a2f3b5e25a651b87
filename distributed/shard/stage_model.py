"""One stage of a pipeline: any mlx-lm model of which only the layers [start, end) run.

The model's own forward runs on every stage, untouched: calls to layers before the stage return the message that came
in, and after the stage's last layer the forward is abandoned, so embeddings, masks and weights that the stage does not
need stay a lazy graph that nobody evaluates. It is used from one compute thread, and does not check token ids: ids
outside the vocabulary corrupt memory silently on MLX's CPU backend, so whoever feeds rank 0 checks them. `load.py`
builds it, the rank's compute thread calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache

from distributed.errors import PartitionError
from distributed.partition import LayerRange
from distributed.shard.caches import CacheTap, advance_phantom
from distributed.shard.hooks import Visitor, decoder_layers, fill_shared_dicts, hook_layers, shared_dicts
from distributed.shard.layer_map import StagePlan, plan_stage, runs_batched
from distributed.shard.message import FromCache, StageMessage, pack_message


class _EndOfStage(Exception):
    """Abandons the forward after the stage's last layer."""

    def __init__(self, message: StageMessage):
        self.message = message


class StageModel:
    """The layers `layer_range` of an mlx-lm model, with what belongs before the first and after the last.

    `num_layers`: of the whole model. `can_batch`: whether it runs on batched caches, on this and every other stage;
    where not, sequences run one by one. `run_layer` runs each of its own layers; `measure` puts a clock in its place.
    """

    def __init__(self, model: nn.Module, layer_range: LayerRange):
        """Takes `model` over: it is of no other use afterwards. Evaluates nothing; the weights may be lazy.

        Raises:
            PartitionError: the model has no such layers.
            ModelError: the architecture cannot be cut, or not run on this machine. A single stage runs any that runs.
        """
        layers = decoder_layers(model)
        if not 0 <= layer_range.start < layer_range.end <= len(layers):
            raise PartitionError(f"a stage shall run the layers {layer_range}, but the model has {len(layers)}")
        self.model = model
        self.layer_range = layer_range
        self.num_layers = len(layers)
        self.is_first = layer_range.start == 0
        self.is_last = layer_range.end == len(layers)
        self.can_batch = runs_batched(model)
        self._layers = layers[layer_range.start : layer_range.end]
        self._plan: StagePlan | None = None  # none for a whole model, which runs as it is
        self._forward: _Forward | None = None
        self.run_layer: Visitor = _just_run
        if not (self.is_first and self.is_last):
            self._plan = plan_stage(model, layer_range)
            hook_layers(layers, self._visit)

    def make_cache(self) -> list[Any]:
        """Fresh caches for one sequence, all different objects: those of its own layers and the few more it needs."""
        cache = make_prompt_cache(self.model)
        return cache if self._plan is None else [cache[entry] for entry in self._plan.held]

    def __call__(self, token_ids: mx.array, message: StageMessage | None, cache: list[Any]) -> Any:
        """Run the stage on `token_ids` (B, L), which every stage gets.

        Args:
            message: what the stage upstream returned; None on the first stage.
            cache: as `make_cache` gives it, or as many batched caches (`type(c).merge([...])` of each); advanced by L.

        Returns:
            The `StageMessage` for the next stage, or on the last stage the logits (B, L, V), all lazy.
        """
        if (message is None) != self.is_first:
            raise ValueError("the first stage takes no message, every other stage needs one")
        if self._plan is None:
            return self.model(token_ids, cache=cache)
        forward = _Forward(self._plan, message, cache)
        self._forward = forward
        try:
            with forward.tap:
                output = self.model(token_ids, cache=[cache[slot] for slot in self._plan.cache_slots])
        except _EndOfStage as end:
            output = end.message
        finally:
            # Who holds on to arrays of a cache makes its next update copy the whole of it.
            self._forward = None
        for slot in self._plan.phantoms:
            advance_phantom(cache[slot], *token_ids.shape)
        return output

    def _visit(self, index: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the hooks ask in place of each layer's forward."""
        forward = self._forward
        assert forward is not None, "the model is called past its StageModel"
        if index < self.layer_range.start:
            return forward.skip(index)
        if index == self.layer_range.start:
            fill_shared_dicts(args, kwargs, forward.shared)
        output = self.run_layer(index, run, args, kwargs)
        if index == self.layer_range.end - 1 and not self.is_last:
            raise _EndOfStage(forward.message_after(output, shared_dicts(args, kwargs)))
        return output

    def example_message(self, num_rows: int = 1, num_tokens: int = 1) -> StageMessage | None:
        """What arrives here for so many tokens of each row, but zeros; None on the first stage."""
        return self._plan.example_message(num_rows, num_tokens) if self._plan and self._plan.example_message else None

    def dry_run(self, cache: list[Any] | None = None, num_tokens: int = 1) -> tuple[Any, list[Any]]:
        """Tokens through the stage, from empty caches and a message of zeros: output and caches, all lazy.

        Their shapes tell what a message and a cache hold; evaluating them reads just the weights the stage needs.

        Args:
            cache: empty caches to try in place of `make_cache`'s, of one sequence or one row.
            num_tokens: of the one sequence.
        """
        cache = self.make_cache() if cache is None else cache
        token_ids = mx.zeros((1, num_tokens), mx.int32)
        return self(token_ids, self.example_message(num_tokens=num_tokens), cache), cache

    def load_weights_of_this_stage(self) -> None:
        """Read what this stage needs and nothing else, a tensor at a time so that the peak stays low.

        The layers' own weights are named; which of the others are needed (embeddings, norm, head, projections that
        recompute a layer's arguments from the ids) shows by running one token.
        """
        for layer in self._layers:
            for _, weight in tree_flatten(layer.parameters()):
                mx.eval(weight)
            mx.clear_cache()
        output, cache = self.dry_run()
        mx.eval(pack_message(output)[0] if isinstance(output, StageMessage) else output, [c.state for c in cache])
        mx.clear_cache()


def _just_run(index: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return run(*args, **kwargs)


class _Forward:
    """State of one call: what came in, and what its caches do."""

    def __init__(self, plan: StagePlan, message: StageMessage | None, cache: list[Any]):
        self.tap = CacheTap(dict(zip(plan.held, cache, strict=True)))
        self._plan = plan
        self._cache = dict(zip(plan.held, cache, strict=True))
        self._incoming = message or StageMessage(None)

    @property
    def shared(self) -> dict[str, Any]:
        return self._incoming.shared

    def skip(self, index: int) -> Any:
        """What a layer before the stage returns: the message, with its keys and values where later layers read them."""
        keys_and_values: dict[FromCache, Any] = {}
        if (entry := self._plan.replicas.get(index)) is not None:
            fetched = self._cache[entry].update_and_fetch(*self._incoming.new_kv[entry])
            keys_and_values = dict(zip(FromCache, fetched, strict=True))
        return tree_map(
            lambda leaf: keys_and_values.get(leaf) if isinstance(leaf, FromCache) else leaf, self._incoming.output
        )

    def message_after(self, output: Any, shared: dict[str, Any]) -> StageMessage:
        """The message for the next stage after the last layer here returned `output`."""
        new_kv = self._incoming.new_kv | self.tap.new_kv
        return StageMessage(
            self.tap.without_cache_contents(output), {entry: new_kv[entry] for entry in self._plan.sends}, shared
        )
