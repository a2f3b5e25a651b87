"""The kinds of values a key can have: how text from a file becomes a number, a list or a size.

Each kind carries the words that an error message ends with, so a message and the check behind it stay together.
The kinds take text (.env, environment) and JSON values (CONFIG_FILE, or a dump that travelled to a rank) alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, SecretStr, TypeAdapter
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Expects:
    """What a key takes, in words that follow "must be"."""

    words: str


class ApiKey(BaseModel):
    """One key a client may show. The label is what the log says in its place."""

    model_config = ConfigDict(frozen=True)
    label: str
    key: SecretStr


def _refused(reason: str) -> PydanticCustomError:
    """A refusal whose reason the message shows after the words of `Expects`."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason})


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic takes JSON's true for 1
        raise _refused("true and false are no numbers")
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _size(value: Any) -> Any:
    return int(_BYTE_SIZE.validate_python(value)) if isinstance(value, str) else value


_BYTE_SIZE = TypeAdapter(ByteSize)


def _word(word: str, meaning: Any) -> BeforeValidator:
    """The word, in any case, stands for `meaning`."""
    return BeforeValidator(lambda value: meaning if isinstance(value, str) and value.strip().lower() == word else value)


def _items(value: Any) -> Any:
    """The entries of a list: a JSON list, one JSON value, or text with commas or spaces between the entries."""
    if isinstance(value, str):
        return tuple(item for item in re.split(r"[,\s]+", value) if item)
    return (value,) if isinstance(value, int | float) else value


def _each(matches: str) -> AfterValidator:
    """Every entry of a list must match the whole pattern."""
    pattern = re.compile(matches)

    def check(items: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [item for item in items if not pattern.fullmatch(item)]:
            raise _refused(f"{bad[0]} is not")
        return items

    return AfterValidator(check)


def _cased(change: Callable[[str], str]) -> BeforeValidator:
    return BeforeValidator(lambda value: change(value.strip()) if isinstance(value, str) else value)


def _api_keys(value: Any) -> Any:
    """`label:key` or `key`; what has no label is called by its place in the list."""
    items = _items(value)
    if not isinstance(items, tuple | list):
        return items
    return tuple(_api_key(item, place) if isinstance(item, str) else item for place, item in enumerate(items, start=1))


def _api_key(text: str, place: int) -> ApiKey:
    label, colon, key = text.strip().partition(":")
    if not colon:
        label, key = f"key-{place}", label
    if not label or not key:
        raise _refused(f"entry {place} has an empty label or key")
    return ApiKey(label=label, key=SecretStr(key))


_HOST = (
    r"[A-Za-z0-9_:\[][A-Za-z0-9_.:%\[\]-]*"  # a name, an alias of ssh's configuration or an address; never an option
)
_ORIGIN = r"\*|[a-z][a-z0-9+.-]*://[^/\s,]+"

Text = Annotated[str, Expects("text")]
Host = Annotated[str, Field(pattern=rf"^({_HOST})?$"), Expects("a host name or an address")]
Hosts = Annotated[
    tuple[str, ...],
    BeforeValidator(_items),
    _each(rf"([A-Za-z0-9_][\w.-]*@)?{_HOST}"),
    Expects("host names or addresses with commas between them, each with user@ before it if needed"),
]
Origins = Annotated[
    tuple[str, ...],
    BeforeValidator(_items),
    _each(_ORIGIN),
    Expects("*, or origins such as https://chat.example.com with commas between them (no path, no slash at the end)"),
]
ApiKeys = Annotated[
    tuple[ApiKey, ...], BeforeValidator(_api_keys), Expects("key or label:key, several with commas between them")
]

_Positive = Annotated[int, Field(ge=1), BeforeValidator(_not_bool)]
Count = Annotated[_Positive, Expects("a whole number, 1 or more")]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(_not_bool), Expects("a whole number, 0 or more")]
OptionalCount = Annotated[_Positive | None, Expects("a whole number, 1 or more, or nothing")]
OptionalCountOrZero = Annotated[CountOrZero | None, Expects("a whole number, 0 or more, or nothing")]
AutoCount = Annotated[_Positive | None, _word("auto", None), Expects("a whole number, 1 or more, or auto")]
CacheBits = Annotated[
    Annotated[Literal[8, 4], BeforeValidator(_whole), BeforeValidator(_not_bool)] | None,
    Expects("8 or 4, or nothing for the model's own precision"),
]
CountsPerRank = Annotated[
    tuple[_Positive, ...],
    BeforeValidator(_items),
    Expects("one whole number for all ranks, or one a rank with commas between them"),
]
LayerCounts = Annotated[
    tuple[_Positive, ...],
    BeforeValidator(_items),
    _word("auto", ()),
    Expects("auto, or the number of layers of each rank with commas between them, each 1 or more, such as 16,14"),
]
Port = Annotated[int, Field(ge=1, le=65535), BeforeValidator(_not_bool), Expects("a port number from 1 to 65535")]

_Bytes = Annotated[int, Field(ge=1), BeforeValidator(_size), BeforeValidator(_not_bool)]
Size = Annotated[_Bytes, Expects("a number of bytes, or a size such as 32 MiB")]
OptionalSize = Annotated[
    _Bytes | None,
    _word("off", None),
    Expects("a number of bytes, a size such as 64 KiB, or off"),
]

_Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_not_bool)]
Seconds = Annotated[_Float, Field(gt=0), Expects("a number of seconds greater than 0")]
SecondsOrZero = Annotated[_Float, Field(ge=0), Expects("a number of seconds, 0 or more")]
Temperature = Annotated[
    Annotated[_Float, Field(ge=0, le=2)] | None, Expects("a number from 0 to 2, or nothing for the model's own")
]
TopP = Annotated[
    Annotated[_Float, Field(gt=0, le=1)] | None,
    Expects("a number greater than 0 and at most 1, or nothing for the model's own"),
]

Switch = Annotated[bool, Expects("true or false")]
LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    _cased(str.upper),
    Expects("one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
]
LogFormat = Annotated[Literal["text", "json"], _cased(str.lower), Expects("text or json")]
UnknownFields = Annotated[Literal["reject", "warn"], _cased(str.lower), Expects("reject or warn")]
