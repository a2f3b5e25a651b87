"""What a client may have meant by a field that its endpoint does not have, for the error that refuses it.

It reads the JSON schema that pydantic makes of a request's class, so it knows every field there is and no other.
Called by `api.validation` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel

from api.schemas.base import NOT_DONE

_MAX_LENGTH = 64  # characters; no field is as long, and comparing takes time
_CUTOFF = 0.72  # of difflib's likeness; "max_tokens" is 0.74 like "max_output_tokens"


def likely_meant(schema: type[BaseModel], path: Sequence[str | int]) -> str | None:
    """The field beside the unknown one at `path` that is most like it and done here; None where none is like it.

    None too where another member of a union has a field of this name: it is spelt well, and in the wrong place.
    """
    *parents, unknown = path
    whole = _json_schema(schema)
    places = list(_members(whole, whole))
    for step in parents:
        places = [member for place in places for member in _members(whole, _child(place, step))]
    fields = {name: field for place in places for name, field in place.get("properties", {}).items()}
    if not isinstance(unknown, str) or len(unknown) > _MAX_LENGTH or unknown in fields:
        return None
    done = [name for name, field in fields.items() if field.get("description") != NOT_DONE]
    return next(iter(get_close_matches(unknown, done, n=1, cutoff=_CUTOFF)), None)


@cache
def _json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    return schema.model_json_schema()


def _child(place: dict[str, Any], step: str | int) -> dict[str, Any]:
    return place.get("items", {}) if isinstance(step, int) else place.get("properties", {}).get(step, {})


def _members(whole: dict[str, Any], place: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas without references and unions that `place` stands for."""
    if "$ref" in place:
        yield from _members(whole, whole["$defs"][place["$ref"].rpartition("/")[2]])
    elif union := place.get("anyOf") or place.get("oneOf"):
        for member in union:
            yield from _members(whole, member)
    else:
        yield place
