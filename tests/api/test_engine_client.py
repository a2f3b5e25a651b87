import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.engine_client import EngineClient
from api.errors import ApiError, ContextLengthExceeded, EngineFailure, NotReady, QueueFull, Stalled
from api.generation import Generation
from server.protocol import (
    Cancel,
    Failed,
    Progress,
    SamplingParams,
    SequenceOutput,
    Shutdown,
    Stats,
    StepOutput,
    Submit,
)
from tests.api.fake_engine import READY, FakeEngine, connected


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(clock: Clock) -> EngineClient:
    return EngineClient({"model_name": "m"}, max_queued_requests=1, request_timeout_s=10, clock=clock)


@pytest.fixture
def roomy(clock: Clock) -> EngineClient:
    """A client whose queue is long enough for what a test sends."""
    return EngineClient({}, max_queued_requests=9, request_timeout_s=10, clock=clock)


def generation(**fields: Any) -> Generation:
    defaults = {"max_tokens": 8, "max_tokens_given": True, "stop_token_ids": [2], "sampling": SamplingParams(seed=7)}
    return Generation(prompt_token_ids=[3, 4, 5], **{**defaults, **fields})


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0)


async def collected(request: Generation) -> tuple[list[int], str | None]:
    """All ids of a request and its finish reason."""
    outputs = [output async for output in request.outputs()]
    return [token_id for output in outputs for token_id in output.token_ids], outputs[-1].finish_reason


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_a_request_reaches_the_ring_and_its_ids_come_back(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            request = generation()
            client.submit(request)
            submitted = await engine.read()
            assert isinstance(submitted, Submit)
            assert submitted.request_id == request.request_id
            assert submitted.prompt_token_ids == [3, 4, 5]
            assert submitted.sampling.seed == 7
            engine.step(request.request_id, 11, start=True)
            engine.step(request.request_id, 12, 2, finish_reason="stop")
            assert await collected(request) == ([11, 12, 2], "stop")
            assert client.generations == {}

    run(test())


def test_rank_0_is_given_its_settings_first(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with client.listening(tmp_path / "s"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            configure = await FakeEngine(reader, writer).read()
            assert configure.settings == {"model_name": "m"}
            writer.close()

    run(test())


def test_the_life_of_the_ring_is_told_in_order(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with client.listening(tmp_path / "s"):
            engine = await FakeEngine.connect(tmp_path / "s")
            engine.send(Progress("loading"))
            engine.send(Failed("broken", permanent=True))
            await engine.leave()
            assert await client.life.get() == Progress("loading")
            assert await client.life.get() == Failed("broken", permanent=True)
            assert await client.life.get() is None

    run(test())


def test_bytes_that_are_no_message_end_the_ring_and_not_the_api(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with client.listening(tmp_path / "s"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            await FakeEngine(reader, writer).read()
            writer.write(b"\x00\x00\x00\x05hello")
            failed = await client.life.get()
            assert isinstance(failed, Failed)
            assert not failed.permanent
            writer.close()

    run(test())


def test_a_second_connection_is_turned_away(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            assert await reader.read() == b""
            writer.close()
            request = generation()
            client.submit(request)
            assert isinstance(await engine.read(), Submit)

    run(test())


def test_a_client_that_leaves_is_told_to_the_ring(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            request = generation()
            client.submit(request)
            await engine.read()
            client.cancel(request)
            assert await engine.read() == Cancel(request.request_id)
            engine.step(request.request_id, 11)  # was on its way
            other = generation()
            client.submit(other)
            await engine.read()
            engine.step(other.request_id, 2, finish_reason="stop")
            assert await collected(other) == ([2], "stop")
            assert request.output_token_ids == []

    run(test())


def test_a_request_that_has_ended_is_not_cancelled_again(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            request = generation()
            client.submit(request)
            await engine.read()
            engine.step(request.request_id, 2, finish_reason="stop")
            await collected(request)
            client.cancel(request)
            client.shut_down()
            assert isinstance(await engine.read(), Shutdown)

    run(test())


def test_a_request_goes_on_where_it_stopped_when_the_ring_is_replaced(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        first, second = generation(), generation()
        async with connected(client, tmp_path) as engine:
            for request in (first, second):
                client.submit(request)
                await engine.read()
            engine.step(first.request_id, 11, 12, start=True)
            await until(lambda: len(first.output_token_ids) == 2)
        third = generation()
        client.submit(third)  # while no ring serves
        async with connected(client, tmp_path) as engine:
            again = [await engine.read() for _ in range(3)]
            assert [submit.request_id for submit in again] == [first.request_id, second.request_id, third.request_id]
            assert again[0].output_token_ids == [11, 12]
            assert again[0].sampling.seed == 7
            assert again[1].output_token_ids == []
            engine.step(first.request_id, 13, 2, finish_reason="stop")
            assert await collected(first) == ([11, 12, 13, 2], "stop")

    run(test())


@pytest.mark.parametrize(("last_ids", "reason"), [([11, 2], "stop"), (list(range(10, 18)), "length")])
def test_a_request_that_was_complete_when_the_ring_died_ends(
    client: EngineClient, tmp_path: Path, last_ids: list[int], reason: str
):
    async def test() -> None:
        request = generation()
        async with connected(client, tmp_path) as engine:
            client.submit(request)
            await engine.read()
            engine.step(request.request_id, *last_ids)
            await until(lambda: len(request.output_token_ids) == len(last_ids))
        async with connected(client, tmp_path):
            assert await collected(request) == (last_ids, reason)
            assert client.generations == {}

    run(test())


def test_a_ring_with_smaller_limits_ends_what_does_not_fit_and_shortens_what_its_client_left_open(
    client: EngineClient, tmp_path: Path
):
    async def test() -> None:
        given, left_open, done = (
            generation(max_tokens=60),
            generation(max_tokens=61, max_tokens_given=False),
            generation(),
        )
        async with connected(client, tmp_path) as engine:
            for request in (given, left_open, done):
                client.submit(request)
                await engine.read()
            engine.step(done.request_id, 11, 2)
            await until(lambda: done.output_token_ids == [11, 2])
        async with connected(client, tmp_path, msgspec.structs.replace(READY, max_sequence_length=62)) as engine:
            with pytest.raises(ContextLengthExceeded, match="62 tokens now, and this one asks for 63"):
                await collected(given)
            assert await collected(done) == ([11, 2], "stop")
            again = await engine.read()
            assert (again.request_id, again.max_tokens) == (left_open.request_id, 59)

    run(test())


def test_a_prompt_made_for_a_ring_with_larger_limits_is_refused_or_its_open_limit_shortened(
    client: EngineClient, tmp_path: Path
):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            with pytest.raises(ContextLengthExceeded, match="64 tokens now, and this one asks for 65"):
                client.submit(generation(), generation(max_tokens=62))
            assert client.generations == {}
            client.submit(generation(max_tokens=62, max_tokens_given=False))
            assert (await engine.read()).max_tokens == 61

    run(test())


def test_what_a_ring_says_after_its_end_is_not_taken_for_the_next_one_s(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            client.suspend()
            engine.send(Stats(READY.ranks, num_running=1, num_waiting=0, num_frames_in_flight=1))
            engine.send(Progress("has been read"))
            assert await client.life.get() == Progress("has been read")
            assert client.stats is None

    run(test())


def test_limits_of_a_key_hold_across_rings(tmp_path: Path):
    client = EngineClient(
        {}, max_queued_requests=9, request_timeout_s=10, max_concurrent_per_key=1, max_queued_per_key=1
    )

    async def test() -> None:
        first, second = generation(owner="a"), generation(owner="a")
        async with connected(client, tmp_path) as engine:
            client.submit(first)
            client.submit(second)
            await engine.read()
            engine.step(first.request_id, 11, start=True)
            await until(lambda: first.is_running)
        async with connected(client, tmp_path) as engine:
            assert (await engine.read()).request_id == first.request_id
            engine.step(first.request_id, 12, start=True)
            await until(lambda: first.is_running)
            with pytest.raises(QueueFull, match="MAX_QUEUED_REQUESTS_PER_KEY=1"):
                client.submit(generation(owner="a"))
            engine.step(first.request_id, 2, finish_reason="stop")
            assert (await engine.read()).request_id == second.request_id

    run(test())


async def die(client: EngineClient, folder: Path, *begun: Generation) -> list[str]:
    """A ring that begins with these and dies out of the blue. Returns the requests it was given."""
    async with connected(client, folder) as engine:
        given = [await engine.read() for _ in client._on_ring]
        for request in begun:
            engine.step(request.request_id, start=True)
        await until(lambda: all(request.is_running for request in begun))
    client.blame()
    return [submit.request_id for submit in given]


def test_what_rings_die_of_is_tried_alone_and_given_up_and_the_others_go_on(roomy: EngineClient, tmp_path: Path):
    async def test() -> None:
        killer, other, _ = requests = [generation() for _ in range(3)]
        roomy.submit(*requests)
        everybody = [request.request_id for request in requests]
        assert await die(roomy, tmp_path, killer, other) == everybody
        assert await die(roomy, tmp_path, killer, other) == everybody
        assert await die(roomy, tmp_path, killer) == [killer.request_id]
        assert roomy.generations
        assert await die(roomy, tmp_path, killer) == [killer.request_id]
        with pytest.raises(EngineFailure, match="while it had no other"):
            await collected(killer)
        async with connected(roomy, tmp_path) as engine:
            assert [(await engine.read()).request_id for _ in range(2)] == everybody[1:]

    run(test())


def test_who_is_tried_runs_alone_until_it_has_got_further(roomy: EngineClient, tmp_path: Path):
    async def test() -> None:
        first, urgent, bystander = generation(), generation(priority=-1), generation()
        roomy.submit(first, urgent)
        for _ in range(2):
            await die(roomy, tmp_path, first, urgent)
        roomy.submit(bystander)
        async with connected(roomy, tmp_path) as engine:
            assert (await engine.read()).request_id == urgent.request_id
            engine.step(urgent.request_id, *range(10, 14), start=True)
            # The next one runs alone as well, so the first has to leave; what it drew meanwhile is drawn again.
            assert await engine.read() == Cancel(urgent.request_id)
            engine.step(urgent.request_id, 14)
            assert (await engine.read()).request_id == first.request_id
            engine.step(first.request_id, *range(10, 14), start=True)
            again = await engine.read()
            assert again.request_id != urgent.request_id and again.output_token_ids == [10, 11, 12, 13]
            assert (await engine.read()).request_id == bystander.request_id
            engine.step(urgent.request_id, 99)  # by its old name: nobody's
            engine.step(again.request_id, 14, 2, finish_reason="stop", start=True)
            assert await collected(urgent) == ([10, 11, 12, 13, 14, 2], "stop")

    run(test())


@pytest.mark.parametrize("end", ["cancelled", "answered"])
def test_a_trial_ends_with_its_request(roomy: EngineClient, tmp_path: Path, end: str):
    async def test() -> None:
        tried, bystander = generation(), generation()
        roomy.submit(tried)
        for _ in range(2):
            await die(roomy, tmp_path, tried)
        roomy.submit(bystander)
        async with connected(roomy, tmp_path) as engine:
            assert (await engine.read()).request_id == tried.request_id
            if end == "cancelled":
                roomy.cancel(tried)
                assert await engine.read() == Cancel(tried.request_id)
            else:
                engine.step(tried.request_id, 2, finish_reason="stop", start=True)
            assert (await engine.read()).request_id == bystander.request_id

    run(test())


def test_while_another_is_tried_nobody_times_out(roomy: EngineClient, clock: Clock, tmp_path: Path):
    async def test() -> None:
        tried, bystander = generation(), generation()
        roomy.submit(tried)
        for _ in range(2):
            await die(roomy, tmp_path, tried)
        roomy.submit(bystander)
        async with connected(roomy, tmp_path) as engine:
            await engine.read()
            engine.step(tried.request_id, start=True)
            await until(lambda: tried.is_running)
            for step in range(1, 5):
                clock.now += 5.0
                stats = Stats([], 1, 0, num_frames_in_flight=1, num_steps=step)
                engine.send(stats)
                await until(lambda expected=stats: roomy.stats == expected)
                roomy.expire("")
        assert list(roomy.generations.values()) == [tried, bystander]

    run(test())


def test_a_ring_that_ended_of_a_known_cause_makes_nobody_a_suspect(roomy: EngineClient, tmp_path: Path):
    async def test() -> None:
        request = generation()
        roomy.submit(request)
        for _ in range(5):
            async with connected(roomy, tmp_path) as engine:
                await engine.read()
                engine.step(request.request_id, start=True)
                await until(lambda: request.is_running)
        assert roomy.generations

    run(test())


def test_a_request_that_kills_the_ring_before_it_begins_is_found_as_well(roomy: EngineClient, tmp_path: Path):
    async def test() -> None:
        request = generation()
        roomy.submit(request)
        for _ in range(4):
            assert await die(roomy, tmp_path) == [request.request_id]
        with pytest.raises(EngineFailure):
            await collected(request)

    run(test())


def test_an_error_of_the_engine_reaches_the_request(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            request = generation()
            client.submit(request)
            engine.send(StepOutput([SequenceOutput(request.request_id, finish_reason="error", error="too big")]))
            with pytest.raises(EngineFailure, match="too big"):
                await collected(request)

    run(test())


def test_a_request_that_may_not_wait_is_told_so(tmp_path: Path):
    client = EngineClient({}, max_queued_requests=0, request_timeout_s=10)

    async def test() -> None:
        async with connected(client, tmp_path) as engine:  # 2 run, none may wait
            requests = [generation(), generation()]
            for request in requests:
                client.submit(request)
                engine.step(request.request_id, 11, start=True)
            await until(lambda: client.num_running == 2)
            with pytest.raises(QueueFull, match=r"^Too few places are free, and no requests may wait .*=0\)"):
                client.submit(generation())

    run(test())


def test_past_the_queue_s_end_a_request_is_refused(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:  # 2 run, 1 may wait
            requests = [generation() for _ in range(3)]
            for request in requests:
                client.submit(request)
            with pytest.raises(QueueFull, match=r"^3 requests are waiting already \(MAX_QUEUED_REQUESTS=1\)") as raised:
                client.submit(generation())
            assert raised.value.retry_after_s
            for request in requests[:2]:
                engine.step(request.request_id, 11, start=True)
            await until(lambda: client.num_running == 2)
            assert client.num_waiting == 1
            with pytest.raises(QueueFull):
                client.submit(generation())
            engine.step(requests[0].request_id, 2, finish_reason="stop")
            await until(lambda: client.num_running == 1)
            client.submit(generation())

    run(test())


def test_a_request_without_progress_times_out(client: EngineClient, clock: Clock, tmp_path: Path):
    async def test() -> None:
        request = generation()
        client.submit(request)
        clock.now = 9
        async with connected(client, tmp_path) as engine:
            await engine.read()
            clock.now = 18
            client.expire("")
            engine.step(request.request_id, 11, start=True)
            await until(lambda: request.is_running)
            clock.now = 27
            client.expire("")
            assert client.generations
            clock.now = 29
            client.expire("")
            assert await engine.read() == Cancel(request.request_id)
            with pytest.raises(Stalled, match="10 s"):
                await collected(request)

    run(test())


def test_without_a_ring_a_request_waits_so_long_and_as_long_as_one_comes_nearer(
    roomy: EngineClient, clock: Clock, tmp_path: Path
):
    async def test() -> None:
        old, new = generation(), generation()
        async with connected(roomy, tmp_path) as engine:
            roomy.submit(old)
            engine.step(old.request_id, 11, start=True)
            await until(lambda: old.is_running)
            clock.now = 5
        clock.now = 14
        roomy.submit(new)
        roomy.expire("")
        roomy.comes_nearer()
        clock.now = 24
        roomy.expire("")
        assert list(roomy.generations.values()) == [old, new]
        clock.now = 25
        roomy.expire("waiting for mac2")
        for request in (old, new):
            with pytest.raises(NotReady, match=r"10 s .*waiting for mac2") as raised:
                await collected(request)
            assert raised.value.retry_after_s
        assert roomy.generations == {}

    run(test())


def test_a_client_that_leaves_while_no_ring_serves_is_not_sent_to_the_next_one(client: EngineClient, tmp_path: Path):
    async def test() -> None:
        stays, leaves = generation(), generation()
        async with connected(client, tmp_path) as engine:
            client.submit(leaves)
            engine.step(leaves.request_id, 11, start=True)
            await until(lambda: leaves.is_running)
        client.submit(stays)
        client.cancel(leaves)
        async with connected(client, tmp_path) as engine:
            assert (await engine.read()).request_id == stays.request_id

    run(test())


def test_a_ring_is_stuck_when_frames_are_in_flight_and_none_is_completed(
    client: EngineClient, clock: Clock, tmp_path: Path
):
    async def stats(engine: FakeEngine, in_flight: int, steps: int) -> None:
        message = Stats([], 0, 0, num_frames_in_flight=in_flight, num_steps=steps)
        engine.send(message)
        await until(lambda: client.stats == message)

    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            for now, in_flight, steps, stuck in [
                (50, 0, 3, 0),  # idle
                (53, 1, 3, 3),  # since the last idle moment
                (60, 1, 3, 10),
                (61, 1, 4, 0),
                (99, 1, 4, 38),
                (100, 0, 5, 0),
            ]:
                clock.now = now
                await stats(engine, in_flight, steps)
                assert client.seconds_without_step() == stuck, (now, in_flight, steps)

    run(test())


def test_a_long_prompt_makes_progress_with_every_step(client: EngineClient, clock: Clock, tmp_path: Path):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            request, waiting = generation(), generation()
            for one in (request, waiting):
                client.submit(one)
                await engine.read()
            engine.step(request.request_id, start=True)
            await until(lambda: request.is_running)
            for step in range(1, 5):
                clock.now = 5.0 * step
                stats = Stats([], 1, 1, num_frames_in_flight=1, num_steps=step)
                engine.send(stats)
                await until(lambda expected=stats: client.stats == expected)
                client.expire("")
            assert client.generations == {request.request_id: request}
            clock.now = 35
            client.expire("")
            assert client.generations == {}

    run(test())


def test_steps_for_others_are_no_progress_of_an_answer_that_has_begun(
    client: EngineClient, clock: Clock, tmp_path: Path
):
    async def test() -> None:
        async with connected(client, tmp_path) as engine:
            request = generation()
            client.submit(request)
            await engine.read()
            engine.step(request.request_id, 11, start=True)
            await until(lambda: request.output_token_ids == [11])
            clock.now = 9
            stats = Stats([], 1, 0, num_frames_in_flight=1, num_steps=5)
            engine.send(stats)
            await until(lambda: client.stats == stats)
            clock.now = 11
            client.expire("")
            assert client.generations == {}

    run(test())


def test_where_no_ring_will_come_every_request_is_told(client: EngineClient):
    async def test() -> None:
        requests = [generation()]
        client.submit(requests[0])
        client.fail_all(ApiError("it is over"))
        with pytest.raises(ApiError, match="it is over"):
            await collected(requests[0])

    run(test())
