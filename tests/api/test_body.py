import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import Request

from api import body
from api.body import parse_json_object, read_json_body
from api.errors import BodyTimeout, BodyTooLarge, InvalidRequest, UnsupportedMediaType


def request_of(chunks: Sequence[bytes], headers: dict[str, str], *, endless: bool = False) -> Request:
    messages: list[Any] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        if endless and len(messages) == 1:
            await asyncio.sleep(60)
        return messages.pop(0)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw, "query_string": b""}, receive)


def read(*chunks: bytes, limit: int = 100, endless: bool = False, **headers: str) -> dict[str, Any]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return parse_json_object(asyncio.run(read_json_body(request_of(chunks, names, endless=endless), limit)))


def test_a_body_in_pieces_is_read_as_one():
    assert read(b'{"a"', b": [1, 2]", b"}") == {"a": [1, 2]}


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not():
    text = b'{"a":"' + b"x" * 92 + b'"}'
    assert len(text) == 100
    assert read(text) == {"a": "x" * 92}
    with pytest.raises(BodyTooLarge, match="100 bytes"):
        read(text + b" ")


def test_a_body_without_a_length_is_counted_while_it_is_read():
    with pytest.raises(BodyTooLarge):
        read(*[b" " * 60] * 3)


def test_a_declared_length_over_the_limit_is_refused_although_less_comes():
    with pytest.raises(BodyTooLarge):
        read(b"{}", content_length="101")


def test_a_body_that_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.05)
    with pytest.raises(BodyTimeout):
        read(b'{"a"', endless=True)


def test_a_body_that_trickles_is_given_up_although_bytes_come(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.05)
    num_sent = 0

    async def receive() -> Any:
        nonlocal num_sent
        num_sent += 1
        await asyncio.sleep(0.005)
        return {"type": "http.request", "body": b" ", "more_body": num_sent < 1000}

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}, receive)
    with pytest.raises(BodyTimeout, match=r"only \d+ bytes"):
        asyncio.run(read_json_body(request, 10_000))


@pytest.mark.parametrize("media_type", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; x=y"])
def test_a_body_that_says_it_is_no_json_is_refused(media_type: str):
    with pytest.raises(UnsupportedMediaType, match="application/json"):
        read(b"{}", content_type=media_type)


@pytest.mark.parametrize("coding", ["gzip", "Zstd", "identity, br"])
def test_a_compressed_body_is_refused_as_one(coding: str):
    with pytest.raises(UnsupportedMediaType, match=r"'Content-Encoding: [a-z]+' is not supported"):
        read(b"\x1f\x8b", content_encoding=coding)


@pytest.mark.parametrize("coding", ["identity", "", "utf-8"])
def test_a_body_that_is_not_compressed_is_taken(coding: str):
    assert read(b"{}", content_encoding=coding) == {}


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8", "application/x+json"])
def test_json_by_any_of_its_names_is_taken(media_type: str):
    assert read(b"{}", content_type=media_type) == {}


@pytest.mark.parametrize("text", [b"[]", b'"x"', b"null", b"1"])
def test_a_body_must_be_an_object(text: bytes):
    with pytest.raises(InvalidRequest, match="JSON object"):
        read(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "parse the JSON"),
        (b"{", "parse the JSON"),
        (b'{"a": 1,}', "parse the JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "parse the JSON.*: the number 9{40}… has too many digits$"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        (b"{" + b",".join(b'"%d":0' % n for n in range(10_001)) + b"}", "more than 10000 members"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"a": "\xff"}', "not valid Unicode"),
        (b'{"a": ["\\ud83d"]}', "not valid Unicode"),
        (b'{"\\udc00": 1}', "not valid Unicode"),
    ],
)
def test_what_is_not_sound_json_is_refused_with_the_reason(text: bytes, says: str):
    with pytest.raises(InvalidRequest, match=says):
        parse_json_object(text)


def test_escaped_characters_outside_the_basic_plane_are_sound():
    assert parse_json_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b"1," * body.MAX_VALUES + b"1]",
        b"[" + b'"",' * body.MAX_VALUES + b'""]',
        b"[" + b"[]," * body.MAX_CONTAINERS + b"1]",
        b'[{"a": "\\\\"},' + b'{"a":"\\"["},' * body.MAX_CONTAINERS + b"1]",
    ],
)
def test_more_values_than_any_request_has_use_for_are_refused(text: bytes):
    with pytest.raises(InvalidRequest, match="more than"):
        parse_json_object(b'{"a":' + text + b"}")


def test_commas_and_brackets_in_strings_are_no_values():
    for piece in (',[{"\\', '\\\\",', "é,[,\n"):  # over the borders of slices, too
        value = {"a": piece * body.MAX_VALUES, "b": [piece]}
        assert parse_json_object(json.dumps(value).encode()) == value
