"""A request's body: read within its limit, and JSON without surprises.

What Python's parser takes and JSON does not (NaN, Infinity), what silently loses data (a key given twice) and what
breaks later (half a surrogate pair, a nesting without end, values without number) is refused here, so nothing behind
this module meets it. Large bodies are read in threads, which must not hold the interpreter for long: the event loop has
other clients' streams to send. Called by the routes that take a body.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from typing import Any, NoReturn

from starlette.requests import Request

from api.errors import BodyTimeout, BodyTooLarge, InvalidRequest, UnsupportedMediaType

BODY_TIMEOUT_S = 60.0  # for a body that does not come, and on top of what one takes that comes slowly
SLOWEST_BYTES_PER_S = 4096
DISCARD_S = 2.0  # how long the rest of a body that is too large is read, so that the client gets to read its 413
MAX_DEPTH = 200  # pydantic writes about 250 levels, and answers repeat what was sent (tools, items)
MAX_MEMBERS = 10_000  # of one object; each one that is wrong would make an error of its own
MAX_VALUES = 2_000_000  # of a body, as a prompt of token ids is long
MAX_CONTAINERS = 100_000  # objects and arrays of a body: Python's collector walks through all of them, and all wait
_SLICE_BYTES = 64 * 1024
_COMPRESSIONS = frozenset("br compress deflate gzip x-compress x-gzip zstd".split())


async def read_json_body(request: Request, max_bytes: int) -> bytes:
    """The body, said to be JSON. Raises UnsupportedMediaType, BodyTooLarge, BodyTimeout and ClientDisconnect."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(
            f"Send the header 'Content-Type: application/json'; {media_type!r} is not supported."
        )
    for coding in request.headers.get("content-encoding", "").lower().split(","):
        if coding.strip() in _COMPRESSIONS:
            raise UnsupportedMediaType(
                f"Send the body as it is: 'Content-Encoding: {coding.strip()}' is not supported."
            )
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared) > max_bytes
    body = bytearray()
    num_bytes = 0
    chunks = aiter(request.stream())
    now = asyncio.get_running_loop().time
    began = now()
    while True:
        try:
            async with asyncio.timeout_at(began + BODY_TIMEOUT_S + num_bytes / SLOWEST_BYTES_PER_S):
                chunk = await anext(chunks, None)
        except TimeoutError:
            seconds = now() - began
            raise BodyTimeout(f"Of the request's body only {num_bytes} bytes came within {seconds:.0f} s.") from None
        if chunk is None or (too_large and now() > began + DISCARD_S):
            break
        num_bytes += len(chunk)
        body += chunk
        if too_large or len(body) > max_bytes:
            too_large = True
            body.clear()
    if too_large:
        raise BodyTooLarge(f"The request's body is larger than {max_bytes} bytes (MAX_BODY_BYTES).")
    return bytes(body)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """The object of a JSON text; InvalidRequest says what is wrong with it."""
    try:
        _check_size(body)
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_not_json,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_members,
        )
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
            _check_depth(value, MAX_DEPTH)
        if b"\\u" in body:
            _check_surrogates(value)
    except RecursionError:
        raise InvalidRequest("The request's body is nested too deeply.") from None
    except UnicodeError:
        raise InvalidRequest("The request's body is not valid Unicode (UTF-8 is expected).") from None
    except ValueError as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request's body must be a JSON object.")
    return value


def _check_size(body: bytes) -> None:
    """Raises ValueError for more values than any request has use for. Most bodies are cleared by a first look."""
    num_commas, num_brackets = _num_values(body)
    if num_commas < MAX_VALUES and num_brackets <= MAX_CONTAINERS:
        return
    # Those of strings do not count. Without escapes every quote begins or ends a string.
    text = body.replace(rb"\\", b"").replace(rb"\"", b"")
    num_commas = num_brackets = first = 0
    for start in range(0, len(text), _SLICE_BYTES):
        pieces = text[start : start + _SLICE_BYTES].split(b'"')
        more_commas, more_brackets = _num_values(b"".join(pieces[first::2]))
        first = (first + len(pieces) - 1) % 2  # 1: the next slice begins within a string
        num_commas, num_brackets = num_commas + more_commas, num_brackets + more_brackets
        if num_commas >= MAX_VALUES or num_brackets > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_VALUES} values, or more than {MAX_CONTAINERS} objects and arrays")


def _num_values(text: bytes) -> tuple[int, int]:
    return text.count(b","), text.count(b"[") + text.count(b"{")


def _check_depth(value: Any, levels_left: int) -> None:
    """Raises RecursionError for what is nested deeper than answers that repeat it can be written."""
    if isinstance(value, dict | list):
        if not levels_left:
            raise RecursionError
        for member in value.values() if isinstance(value, dict) else value:
            _check_depth(member, levels_left - 1)


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _integer(text: str) -> int:
    """As Python's parser reads it, but in a function of ours: between two of them other threads get their turn."""
    try:
        return int(text)
    except ValueError:  # Python bounds the time that one takes
        raise ValueError(f"the number {text[:40]}… has too many digits") from None


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        raise ValueError(f"an object has more than {MAX_MEMBERS} members")
    members = dict(pairs)
    if len(members) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is given twice")
    return members


def _check_surrogates(value: Any) -> None:
    """Raises UnicodeEncodeError for half a surrogate pair, which no tokenizer takes."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for name, member in value.items():
            name.encode()
            _check_surrogates(member)
    elif isinstance(value, list):
        for member in value:
            _check_surrogates(member)
