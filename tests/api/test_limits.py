"""Limits of one API key: their bookkeeping, and what of it the ring and clients see."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.engine_client import EngineClient
from api.errors import ApiError, InvalidRequest, QueueFull
from api.generation import Generation
from api.limits import KeyLimits
from config import Settings
from server.protocol import Cancel, SamplingParams, Submit
from tests.api.fake_engine import FakeEngine, connected
from tests.api.served_app import BODY, Served, run, served


def room(limits: KeyLimits, owner: str | None, num_more: int = 1, **counts: int) -> bool:
    return limits.has_room(owner, num_more, **{"num_running": 0, "num_waiting": 0, "num_free": 32, **counts})


def test_a_key_s_requests_enter_until_its_places_are_taken():
    limits = KeyLimits(2, None)
    assert [limits.enter("alice", name) for name in "abc"] == [True, True, False]
    assert [limits.holds_back(name) for name in "abc"] == [False, False, True]
    assert limits.enter("bob", "d")


def test_a_place_that_is_left_is_the_next_one_s_in_their_order():
    limits = KeyLimits(1, None)
    for name in "abc":
        limits.enter("alice", name)
    assert limits.leave("alice", "a") == "b"
    assert not limits.holds_back("b")
    assert limits.leave("alice", "b") == "c"
    assert limits.leave("alice", "c") is None
    assert limits.enter("alice", "d")


def test_among_those_that_wait_the_smaller_priority_goes_first():
    limits = KeyLimits(1, None)
    for name, priority in [("running", 5), ("later", 1), ("first", -1), ("last", 1)]:
        limits.enter("alice", name, priority)
    assert limits.leave("alice", "running") == "first"
    assert limits.leave("alice", "first") == "later"
    assert limits.leave("alice", "later") == "last"


def test_one_that_ends_while_it_waits_frees_no_place():
    limits = KeyLimits(1, None)
    for name in "abc":
        limits.enter("alice", name)
    assert limits.leave("alice", "b") is None
    assert not limits.holds_back("b")
    assert limits.leave("alice", "a") == "c"


def test_without_a_key_or_without_limits_everything_enters():
    assert all(KeyLimits(1, 0).enter(None, name) for name in "abc")
    assert room(KeyLimits(1, 0), None, num_running=1, num_waiting=9)
    assert all(KeyLimits(None, 0).enter("alice", name) for name in "abc")
    assert KeyLimits(None, 0).leave("alice", "a") is None


@pytest.mark.parametrize(
    ("limits", "num_more", "counts", "has_room"),
    [
        ((2, 1), 3, {}, True),  # two run, one waits
        ((2, 1), 4, {}, False),
        ((2, 1), 1, {"num_running": 2, "num_waiting": 0}, True),
        ((2, 1), 1, {"num_running": 2, "num_waiting": 1}, False),
        ((2, 1), 1, {"num_running": 0, "num_waiting": 3}, False),  # all wait behind other keys
        ((2, 0), 1, {"num_running": 2}, False),
        ((2, None), 9, {"num_running": 2, "num_waiting": 9}, True),
        ((None, 1), 2, {"num_running": 30, "num_free": 1}, True),
        ((None, 1), 2, {"num_running": 31, "num_free": 0}, False),
    ],
)
def test_past_what_may_run_and_wait_there_is_no_room(limits: Any, num_more: int, counts: Any, has_room: bool):
    assert room(KeyLimits(*limits), "alice", num_more, **counts) is has_room


# -- in front of a ring ----------------------------------------------------------------------------------------------


def client_of(max_concurrent: int | None, max_queued: int | None) -> EngineClient:
    return EngineClient(
        {},
        max_queued_requests=100,
        request_timeout_s=10,
        max_concurrent_per_key=max_concurrent,
        max_queued_per_key=max_queued,
    )


def generations(owner: str | None, count: int) -> list[Generation]:
    sampling = SamplingParams(seed=7)
    return [
        Generation([3, 4, 5], sampling, max_tokens=8, max_tokens_given=True, stop_token_ids=[2], owner=owner)
        for _ in range(count)
    ]


async def assert_submitted(engine: FakeEngine, *requests: Generation) -> None:
    """The ring gets these next, and nothing before them."""
    for request in requests:
        message = await engine.read()
        assert isinstance(message, Submit) and message.request_id == request.request_id


def test_requests_past_a_key_s_places_wait_in_the_api_while_other_keys_pass(tmp_path: Path):
    client = client_of(1, None)
    first, second, third = generations("alice", 3)
    (other,) = generations("bob", 1)

    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            for request in (first, second, third, other):
                client.submit(request)
            await assert_submitted(engine, first, other)
            assert (client.num_running, client.num_waiting) == (0, 4)
            engine.step(first.request_id, 2, finish_reason="stop")
            await assert_submitted(engine, second)
            client.cancel(second)
            assert await engine.read() == Cancel(second.request_id)
            await assert_submitted(engine, third)

    run(test())


def test_a_client_that_leaves_while_it_waits_is_never_told_to_the_ring(tmp_path: Path):
    client = client_of(1, None)
    first, second, third = generations("alice", 3)

    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            client.submit(first, second, third)
            client.cancel(second)
            client.cancel(first)
            await assert_submitted(engine, first)
            assert await engine.read() == Cancel(first.request_id)
            await assert_submitted(engine, third)
            assert list(client.generations) == [third.request_id]

    run(test())


def test_choices_that_wait_are_not_sent_to_the_ring_when_their_client_leaves(tmp_path: Path):
    client = client_of(1, None)
    first, second, third, later = generations("alice", 4)

    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            client.submit(first, second, third)
            client.submit(later)
            client.cancel(first, second, third)
            await assert_submitted(engine, first)
            assert await engine.read() == Cancel(first.request_id)
            await assert_submitted(engine, later)

    run(test())


def test_another_ring_is_given_no_more_of_a_key_than_the_lost_one(tmp_path: Path):
    client = client_of(1, None)
    first, second, third = generations("alice", 3)

    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            client.submit(first, second, third)
            await assert_submitted(engine, first)
            engine.step(first.request_id, 11, start=True)
            assert (await anext(first.outputs())).token_ids == [11]
        async with connected(client, tmp_path) as engine:
            await assert_submitted(engine, first)
            engine.step(first.request_id, 12, 2)  # its last token; the ring is lost before it says so
            assert (await anext(first.outputs())).token_ids == [12, 2]
        async with connected(client, tmp_path) as engine:
            await assert_submitted(engine, second)
            client.cancel(second)
            assert await engine.read() == Cancel(second.request_id)
            await assert_submitted(engine, third)

    run(test())


def test_a_request_with_more_choices_than_may_wait_is_refused_whole(tmp_path: Path):
    client = client_of(1, 1)

    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            with pytest.raises(InvalidRequest, match="at most 2"):  # an idle server would not take them either
                client.submit(*generations("alice", 3))
            assert client.generations == {}
            pair = generations("alice", 2)
            client.submit(*pair)
            await assert_submitted(engine, pair[0])
            with pytest.raises(QueueFull, match="MAX_QUEUED_REQUESTS_PER_KEY=1"):
                client.submit(*generations("alice", 1))
            client.submit(*generations("bob", 2))

    run(test())


def test_where_no_ring_will_come_those_that_wait_are_told_too():
    client = client_of(1, None)
    pair = generations("alice", 2)
    client.submit(*pair)
    client.fail_all(ApiError("it is over"))

    async def test() -> None:
        for request in pair:
            with pytest.raises(ApiError, match="it is over"):
                await anext(request.outputs())

    run(test())
    assert client.generations == {}


# -- as clients see it -----------------------------------------------------------------------------------------------

KEYS = Settings.model_validate({"api_keys": "alice:secret-a,bob:secret-b"}).api_keys


async def ask(app: Served, key: str, **fields: Any) -> httpx.Response:
    return await app.http.post("/v1/chat/completions", json={**BODY, **fields}, headers={"x-api-key": key})


def test_past_a_key_s_queue_its_client_gets_a_429_and_another_key_is_served(tmp_path: Path, tiny_chat_model: Path):
    limits: Any = {"max_concurrent_requests_per_key": 1, "max_queued_requests_per_key": 1}

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, api_keys=KEYS, **limits) as app:
            first, second = (asyncio.create_task(ask(app, "secret-a")) for _ in range(2))
            await app.until(lambda: app.client.num_waiting == 2)
            for fields in ({}, {"n": 2}):
                refused = await ask(app, "secret-a", **fields)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                assert int(refused.headers["retry-after"]) > 0
            assert (await ask(app, "secret-b", n=3)).status_code == 400
            other = asyncio.create_task(ask(app, "secret-b"))
            await app.until(lambda: app.client.num_waiting == 3)
            for _ in range(3):  # alice's first, bob's, and alice's second once there is a place for it
                await app.answer("hi")
            answers = [await task for task in (first, second, other)]
            assert [answer.status_code for answer in answers] == [200] * 3

    run(test())
