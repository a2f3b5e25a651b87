"""What one stage hands to the next, and how it is taken apart for the wire.

A `StageMessage` is whatever the decoder layer upstream returned, plus what later layers share with earlier ones.
Packing yields a flat list of arrays and a JSON-able structure; nothing here evaluates an array or knows a model.
`StageModel` makes and takes messages, `server.stage` packs and unpacks them.
"""

from __future__ import annotations

import enum
import importlib
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from distributed.errors import ModelError

OBJECT_MODULES = "mlx_lm.models."  # only objects of mlx-lm's own classes travel


class FromCache(enum.Enum):
    """Stands in a message for keys or values that a layer fetched from its cache.

    Some layers return these beside the hidden states (gemma4). They hold the whole context, so they stay at home: the
    stage downstream puts its replica's in their place, or nothing where no later layer reads them.
    """

    KEYS = "keys"
    VALUES = "values"


@dataclass(frozen=True)
class StageMessage:
    """Output of a stage's last layer, lazy.

    `output`: mostly one array of hidden states (B, L, D); a tuple, list, dict or small object for some architectures.
    `new_kv`: for cache entries that later layers read too, the keys and values (B, H, L, D) of this step's tokens.
    `shared`: what layers left for later ones in a dict that the model passes from layer to layer.
    """

    output: Any
    new_kv: dict[int, tuple[mx.array, mx.array]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


def pack_message(message: StageMessage) -> tuple[list[mx.array], Any]:
    """The message's arrays, and a structure of JSON types that says where they belong.

    Raises:
        ModelError: a layer returned something that cannot travel.
    """
    arrays: list[mx.array] = []
    structure = [_pack(part, arrays) for part in (message.output, message.new_kv, message.shared)]
    return arrays, structure


def unpack_message(structure: Any, arrays: list[mx.array]) -> StageMessage:
    """The inverse of `pack_message`; `arrays` in the order that it gave them."""
    output, new_kv, shared = (_unpack(part, arrays) for part in structure)
    return StageMessage(output, new_kv, shared)


def _pack(value: Any, arrays: list[mx.array]) -> Any:
    if isinstance(value, mx.array):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, FromCache):
        return {"from_cache": value.value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_pack(item, arrays) for item in value]}
    if type(value) is dict:
        return {"dict": [[key, _pack(item, arrays)] for key, item in value.items()]}
    if type(value).__module__.startswith(OBJECT_MODULES):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"object": name, "fields": _pack(dict(vars(value)), arrays)}
    raise ModelError(
        f"a layer of this architecture returns a {type(value).__name__}, which cannot be sent to the next rank; "
        "run this model on one rank"
    )


def _unpack(packed: Any, arrays: list[mx.array]) -> Any:
    if not isinstance(packed, dict):
        return packed
    match packed:
        case {"array": index}:
            return arrays[index]
        case {"from_cache": name}:
            return FromCache(name)
        case {"list": items}:
            return [_unpack(item, arrays) for item in items]
        case {"tuple": items}:
            return tuple(_unpack(item, arrays) for item in items)
        case {"dict": items}:
            return {key: _unpack(item, arrays) for key, item in items}
        case {"object": name, "fields": fields}:
            module, _, qualname = name.partition(":")
            if not module.startswith(OBJECT_MODULES):
                raise ModelError(f"a message names {name}, which is no class of mlx-lm")
            cls = getattr(importlib.import_module(module), qualname)
            value = cls.__new__(cls)
            vars(value).update(_unpack(fields, arrays))
            return value
    raise ModelError(f"a message holds {sorted(packed)}, which this version does not know")
