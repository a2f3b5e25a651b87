"""Steps between a model's own forward and its decoder layers, without touching the forward.

Each layer's class is replaced by a subclass of it whose `__call__` asks a visitor, who decides whether the layer runs;
parameters, attributes and `isinstance` stay as they were. The layer map's dry run and `StageModel` are the visitors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn

# (index of the layer, the layer's own forward, its positional and keyword arguments) -> what the layer returns
Visitor = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of an mlx-lm model, in order."""
    return list(model.layers)


def hook_layers(layers: Sequence[nn.Module], visitor: Visitor) -> None:
    """Let `visitor` answer every call to one of `layers`, from now on."""
    for index, layer in enumerate(layers):
        layer.__class__ = _hooked(type(layer), index, visitor)


def _hooked(layer_class: type, index: int, visitor: Visitor) -> type:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return visitor(index, partial(layer_class.__call__, self), args, kwargs)

    members = {"__call__": __call__, "__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (layer_class,), members)


def shared_dicts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Contents of the plain dicts among a layer's arguments: what layers leave there for later ones (deepseek_v41)."""
    return {key: value for shared in _plain_dicts(args, kwargs) for key, value in shared.items()}


def fill_shared_dicts(args: tuple[Any, ...], kwargs: dict[str, Any], contents: dict[str, Any]) -> None:
    """Put the contents that came from the stage upstream where a layer looks for them."""
    for shared in _plain_dicts(args, kwargs):
        shared.update(contents)


def _plain_dicts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for value in (*args, *kwargs.values()) if type(value) is dict]
