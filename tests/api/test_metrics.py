"""/metrics in front of a scripted rank 0, where the test knows every number, and of a real ring."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from config import Settings
from server.protocol import SchedulerCounters, SequenceOutput, StageCounters, Stats, StepOutput
from tests.api.fake_engine import READY
from tests.api.served_app import BODY, Served, run, served
from tests.api.test_app import COMPLETIONS, assert_openai_error
from tests.conftest import StartServer

Samples = dict[tuple[str, tuple[str, ...]], float]


def samples(text: str) -> Samples:
    """Values by name without our prefix, and label values (the host left out)."""
    return {
        (sample.name.removeprefix("mlx_ring_"), tuple(v for k, v in sorted(sample.labels.items()) if k != "host")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(app: Served) -> Samples:
    answer = await app.http.get("/metrics")
    assert answer.status_code == 200
    return samples(answer.text)


def post(app: Served, **fields: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(app.http.post(COMPLETIONS, json={**BODY, **fields}))


def test_an_answer_is_counted_with_its_length_and_its_latencies(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True)
            submit = await app.answer("one", " two", " three")
            await asking
            found = await scrape(app)
            assert found["requests_total", ("stop",)] == 1
            assert found["request_prompt_tokens_sum", ()] == len(submit.prompt_token_ids)
            num_tokens = sum(len(app.ids(text)) for text in ("one", " two", " three")) + 1
            assert found["request_generation_tokens_sum", ()] == num_tokens
            for once in ("request_queue_time", "time_to_first_token", "e2e_request_latency"):
                assert found[f"{once}_seconds_count", ()] == 1
            assert found["inter_token_latency_seconds_count", ()] == 3  # steps after the first
            assert 0 < found["time_to_first_token_seconds_sum", ()] <= found["e2e_request_latency_seconds_sum", ()]
            assert found["inter_token_latency_seconds_bucket", ("+Inf",)] == 3

    run(test())


def test_the_ways_a_request_ends_are_counted_apart_and_each_request_once(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            await post(app, temperature=9)
            await post(app, model="other")
            for stream in (False, True):
                asking = post(app, stream=stream)
                submit = await app.answer(finish_reason=None)
                app.engine.send(StepOutput([SequenceOutput(submit.request_id, finish_reason="error", error="broke")]))
                await asking
            asking = post(app, stream=True)
            submit = await app.answer("one", finish_reason=None)
            app.engine.send(StepOutput([SequenceOutput(submit.request_id, finish_reason="error", error="broke")]))
            await asking
            leaving = post(app)
            await app.answer("one", finish_reason=None)
            leaving.cancel()
            await app.until(lambda: not app.client.generations)
            limited = post(app)
            await app.engine.read()  # the cancel
            await app.answer("one", finish_reason="length")
            await limited
            found = await scrape(app)
            outcomes = {labels[0]: value for (name, labels), value in found.items() if name == "requests_total"}
            assert outcomes == {"400": 1, "404": 1, "500": 3, "abort": 1, "length": 1}
            assert found["e2e_request_latency_seconds_count", ()] == 1

    run(test())


def test_ring_ranks_and_caches_are_what_rank_0_said_last(tmp_path: Path, tiny_chat_model: Path):
    counters = StageCounters(30.0, 600.0, 10.0, 1.5, 2.5, num_frames=400, num_tokens=900)
    scheduler = SchedulerCounters(2, 100, 3, 70, 500, 200, 400, 1)
    changes = {"memory_bytes": 7, "kv_cache_bytes": 6, "prefix_cache_bytes": 5, "counters": counters}
    first = msgspec.structs.replace(READY.ranks[0], **changes)
    second = msgspec.structs.replace(first, rank=1, host='an "odd" host')

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            waiting = post(app)
            await app.engine.read()
            app.engine.send(Stats([first, second], num_running=1, num_waiting=0, counters=scheduler))
            await app.until(lambda: app.client.stats is not None)
            found = await scrape(app)
            for rank in ("0", "1"):
                assert found["rank_busy_seconds_total", (rank,)] == 30
                assert found["rank_idle_seconds_total", (rank,)] == 600
                assert found["rank_bubble_seconds_total", (rank,)] == 10
                assert found["rank_receiving_seconds_total", (rank,)] == 1.5
                assert found["rank_sending_seconds_total", (rank,)] == 2.5
                assert found["rank_frames_total", (rank,)] == 400
                assert found["rank_tokens_total", (rank,)] == 900
                assert found["rank_memory_bytes", (rank,)] == 7
                assert found["rank_kv_cache_bytes", (rank,)] == 6
                assert found["rank_kv_cache_limit_bytes", (rank,)] == 10
                assert found["rank_prefix_cache_bytes", (rank,)] == 5
            assert found["num_micro_batch_groups", ()] == 2
            assert (found["kv_cache_tokens", ()], found["kv_cache_capacity_tokens", ()]) == (100, 256)
            assert (found["prefix_cache_entries", ()], found["prefix_cache_tokens", ()]) == (3, 70)
            assert (found["prompt_tokens_total", ()], found["prompt_tokens_cached_total", ()]) == (500, 200)
            assert (found["generation_tokens_total", ()], found["num_preemptions_total", ()]) == (400, 1)
            assert (found["num_requests_running", ()], found["num_requests_waiting", ()]) == (0, 1)
            health = (await app.http.get("/health")).json()
            cached = {"entries": 3, "tokens": 70, "prompt_tokens": 500, "cached_tokens": 200}
            assert health["prefix_cache"] == cached
            assert health["ranks"][1]["counters"] == msgspec.structs.asdict(counters)
            waiting.cancel()

    run(test())


def test_without_a_ring_the_state_is_said_and_no_stale_number(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            assert (await scrape(app))["state", ("ready",)] == 1
            app.client.suspend()
            app.supervisor.state, app.supervisor.num_lost = "restarting", 1
            found = await scrape(app)
            assert (found["state", ("restarting",)], found["state", ("ready",)]) == (1, 0)
            assert found["restarts_total", ()] == 1
            assert not [name for name, _ in found if name.startswith(("rank_", "kv_cache", "prompt_tokens"))]

    run(test())


def test_metrics_are_for_those_who_show_a_key(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        keys = Settings.model_validate({"api_keys": "prometheus:secret"}).api_keys
        async with served(tmp_path, tiny_chat_model, api_keys=keys) as app:
            assert_openai_error(await app.http.get("/metrics"), 401)
            answer = await app.http.get("/metrics", headers={"authorization": "Bearer secret"})
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/plain")

    run(test())


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_scraper_that_asks_for_openmetrics_gets_it(tmp_path: Path, tiny_chat_model: Path, method: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            accept = {"accept": "application/openmetrics-text;version=1.0.0"}
            answer = await app.http.request(method, "/metrics", headers=accept)
            assert answer.headers["content-type"].startswith("application/openmetrics-text")
            if method == "GET":
                names = {family.name for family in parse_openmetrics(answer.text)}
                assert {"mlx_ring_state", "mlx_ring_requests", "mlx_ring_time_to_first_token_seconds"} <= names

    run(test())


@pytest.mark.ring
def test_a_request_shows_on_every_rank_of_a_real_ring(running_server: StartServer):
    server = running_server(RING_SIZE=2)

    def when_ranks_ran(*num_tokens: float) -> Samples:
        """What is scraped once each rank has run so many tokens: their counts come with the next heartbeats."""
        deadline = time.monotonic() + 10
        while True:
            found = samples(httpx.get(f"{server.url}/metrics").text)
            if all(found.get(("rank_tokens_total", (rank,)), -1) >= num for rank, num in zip("01", num_tokens)):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)

    messages: Any = [{"role": "user", "content": "one two three four five " * 20}]
    fields: Any = {"model": server.model, "messages": messages, "max_tokens": 24, "temperature": 0}

    def ask() -> tuple[Any, Samples, Samples]:
        """A request's usage, what is scraped after it, and what it added."""
        before = when_ranks_ran(1, 1)
        usage = server.client().chat.completions.create(**fields).usage
        # The last one sampled is not run.
        num_run = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens + usage.completion_tokens - 1
        found = when_ranks_ran(*(before["rank_tokens_total", (rank,)] + num_run for rank in "01"))
        return usage, found, {name: value - before.get(name, 0) for name, value in found.items()}

    server.client().chat.completions.create(**fields)
    usage, found, grown = ask()
    cached_tokens = usage.prompt_tokens_details.cached_tokens
    assert found["state", ("ready",)] == 1
    assert grown["request_prompt_tokens_sum", ()] == usage.prompt_tokens
    assert grown["request_generation_tokens_sum", ()] == usage.completion_tokens
    assert grown["inter_token_latency_seconds_count", ()] == usage.completion_tokens - 1
    assert grown["prompt_tokens_total", ()] >= usage.prompt_tokens
    assert grown["prompt_tokens_cached_total", ()] >= cached_tokens > 0
    assert grown["generation_tokens_total", ()] >= usage.completion_tokens
    for rank in "01":
        assert grown["rank_frames_total", (rank,)] >= usage.completion_tokens
        for doing in ("busy", "bubble", "receiving", "sending"):
            assert 0 < grown[f"rank_{doing}_seconds_total", (rank,)] < 60, (doing, rank)
        assert found["rank_memory_bytes", (rank,)] > 0
    # One stream: whatever rank 0 computes, rank 1 waits for, but for the first frame after the ring was idle. Where
    # something else held that one up, it can take as long as all the others: then another request tells.
    for _ in range(5):
        if grown["rank_bubble_seconds_total", ("1",)] > grown["rank_busy_seconds_total", ("0",)] / 2:
            break
        _, _, grown = ask()
    else:
        raise AssertionError(grown)
