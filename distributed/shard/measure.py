"""How long a decode step takes on one stage: each of its layers, and what it does besides them.

Layers are timed one by one, each evaluated before the next begins, on random hidden states, so that the rows of a
mixture of experts go to different experts. It changes nothing but caches of its own. Each rank calls it at start-up
where nobody knows the times yet, one rank of a machine at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from distributed.layer_times import StageTimes
from distributed.shard.message import StageMessage, pack_message
from distributed.shard.stage_model import StageModel

# The balance counts while several groups are on their way, so a step is timed as a group would run it.
NUM_ROWS = 4
_MIN_STEPS, _MAX_STEPS = 4, 15
_ENOUGH_S = 0.5

Finish = Callable[[mx.array], mx.array]  # logits (rows, 1, vocabulary) -> sampled ids


def measure_stage(stage: StageModel, finish: Finish) -> StageTimes:
    """The seconds of a decode step of `NUM_ROWS` rows (1 where the model cannot batch), over a short context.

    Of several steps the quickest time of each part counts: what disturbs a measurement only adds to it.

    Args:
        stage: one of several, loaded.
        finish: what the last rank does with the logits.
    """
    step = _TimedStep(stage, NUM_ROWS if stage.can_batch else 1, finish)
    step.run()  # allocates caches, compiles kernels
    samples: list[list[float]] = []
    started = time.perf_counter()
    while len(samples) < _MIN_STEPS or (len(samples) < _MAX_STEPS and time.perf_counter() - started < _ENOUGH_S):
        samples.append(step.run())
    mx.clear_cache()
    evaluation = min(_seconds_of_an_evaluation() for _ in range(10))
    before, *layers, after = [_without(evaluation, min(part)) for part in zip(*samples, strict=True)]
    return StageTimes(stage.layer_range.start, layers, before + after)


class _TimedStep:
    """A decode step that can be run again and again, with a clock between its layers."""

    def __init__(self, stage: StageModel, num_rows: int, finish: Finish) -> None:
        self._stage, self._finish = stage, finish
        self._token_ids = mx.arange(num_rows, dtype=mx.int32)[:, None]
        self._message = _noise(stage.example_message(num_rows))
        self._cache = stage.make_cache()
        self._marks: list[float] = []

    def run(self) -> list[float]:
        """Seconds of what comes before the layers, of each layer, and of what comes after them."""
        run_layer = self._stage.run_layer
        self._stage.run_layer = self._run_layer
        self._marks = [time.perf_counter()]
        try:
            output = self._stage(self._token_ids, self._message, self._cache)
        finally:
            self._stage.run_layer = run_layer
        after = self._finish(output) if self._stage.is_last else pack_message(output)[0]
        mx.eval(after, [cache.state for cache in self._cache])
        self._mark()
        return [end - start for start, end in zip(self._marks, self._marks[1:])]

    def _run_layer(self, index: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == self._stage.layer_range.start:
            # Only on the first stage: elsewhere, what a layer is given but does not use may have weights that are not
            # on this machine. What little those stages have to do before their layers counts as their first one's.
            if self._stage.is_first:
                mx.eval([leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, mx.array)])
            self._mark()
        output = run(*args, **kwargs)
        caches = [leaf for leaf in _leaves((args, kwargs)) if hasattr(leaf, "state") and not leaf.empty()]
        mx.eval(pack_message(StageMessage(output))[0], [cache.state for cache in caches])
        self._mark()
        return output

    def _mark(self) -> None:
        self._marks.append(time.perf_counter())


def _leaves(arguments: Any) -> list[Any]:
    return [leaf for _, leaf in tree_flatten(arguments)]


def _noise(message: StageMessage | None) -> StageMessage | None:
    """The message with noise in the place of its floating-point numbers."""

    def noise(leaf: Any) -> Any:
        if isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating):
            return mx.random.normal(leaf.shape, leaf.dtype, key=mx.random.key(0))
        return leaf

    if message is None:
        return None
    noisy = StageMessage(*(tree_map(noise, part) for part in (message.output, message.new_kv, message.shared)))
    mx.eval(pack_message(noisy)[0])
    return noisy


def _seconds_of_an_evaluation() -> float:
    """What evaluating costs by itself: in a real step all layers are evaluated at once."""
    started = time.perf_counter()
    mx.eval(mx.zeros(1) + 1)
    return time.perf_counter() - started


def _without(evaluation: float, seconds: float) -> float:
    return max(seconds - evaluation, seconds / 10)  # a time of nothing could not be compared with others
