"""Real servers of 1, 2 and 3 ranks, used as people do: with OpenAI's SDK."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from tests.conftest import StartServer
from tests.running_server import RunningServer

pytestmark = pytest.mark.ring

HELLO: Any = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda size: f"{size} ranks")
def server(request: pytest.FixtureRequest, running_server: StartServer) -> RunningServer:
    return running_server(RING_SIZE=request.param)


@pytest.fixture
def sdk(server: RunningServer) -> OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_model: Path) -> TokenizerWrapper:
    return load(tiny_chat_model)


def ask(server: RunningServer, messages: Any = HELLO, **fields: Any) -> Any:
    fields = {"model": server.model, "max_tokens": 24, "temperature": 0, **fields}
    return server.client().chat.completions.create(messages=messages, **fields)


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content


def always(tokenizer: TokenizerWrapper, *texts: str) -> dict[str, float]:
    """A logit_bias under which the model says nothing but these tokens."""
    return {str(token_id): 100.0 for text in texts for token_id in tokenizer.encode(text, add_special_tokens=False)}


def test_the_answer_is_the_same_on_every_ring_and_streamed_or_not(server: RunningServer, running_server: StartServer):
    alone = ask(running_server(RING_SIZE=1))
    answer = ask(server)
    assert text_of(answer) == text_of(alone)
    assert answer.choices[0].finish_reason == alone.choices[0].finish_reason
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text_of(answer)
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_choices_of_one_prompt_read_it_once(server: RunningServer):
    messages: Any = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 12}]

    def has_counted_all(health: dict[str, Any]) -> bool:
        """The ranks report once a second: what has not changed for two is all that earlier tests asked for."""
        counts = health.get("prefix_cache")
        if not seen or seen[-1][1] != counts:
            seen.append((health["uptime_s"], counts))
        return counts is not None and health["uptime_s"] - seen[-1][0] > 2

    seen: list[tuple[float, Any]] = []
    before = server.wait_until(has_counted_all, "counted")["prefix_cache"]
    answer = ask(server, messages, n=4, seed=3, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) == 4
    alone = ask(server, messages, seed=5, temperature=1)
    assert text_of(alone) == answer.choices[2].message.content, "a choice's seed is the request's and its index"
    num_prompt = answer.usage.prompt_tokens
    assert num_prompt > 128

    def is_read_once(health: dict[str, Any]) -> bool:
        now = health["prefix_cache"]
        computed = now["prompt_tokens"] - before["prompt_tokens"] - (now["cached_tokens"] - before["cached_tokens"])
        return now["prompt_tokens"] - before["prompt_tokens"] == 5 * num_prompt and computed < 1.2 * num_prompt

    server.wait_until(is_read_once, "read once", timeout_s=10)


def test_many_at_once_get_what_each_gets_alone(server: RunningServer):
    prompts: list[Any] = [[{"role": "user", "content": "one two three " * length}] for length in range(1, 9)]
    alone = [text_of(ask(server, prompt)) for prompt in prompts]

    async def all_at_once() -> list[str]:
        async with server.async_client() as sdk:
            fields = {"model": server.model, "max_tokens": 24, "temperature": 0}
            answers = [sdk.chat.completions.create(messages=prompt, **fields) for prompt in prompts]
            return [text_of(answer) for answer in await asyncio.gather(*answers)]

    assert asyncio.run(all_at_once()) == alone


def test_a_seed_repeats_a_sampled_answer(server: RunningServer):
    answers = [text_of(ask(server, temperature=1, seed=seed)) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_stop_strings_end_an_answer_between_tokens(server: RunningServer, tokenizer: TokenizerWrapper):
    bias = always(tokenizer, "a")
    whole = ask(server, logit_bias=bias)
    assert text_of(whole) == "a" * 24
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 24)
    cut = ask(server, logit_bias=bias, stop=["aaaa", "b"])
    assert (text_of(cut), cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("", "stop", 4)
    missed = ask(server, logit_bias=bias, stop="a" * 25)
    assert (text_of(missed), missed.choices[0].finish_reason) == ("a" * 24, "length")


def test_an_answer_ends_where_the_model_ends_it(server: RunningServer, tokenizer: TokenizerWrapper):
    answer = ask(server, logit_bias={str(tokenizer.eos_token_id): 100})
    assert (text_of(answer), answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("", "stop", 1)


def test_the_performance_of_an_answer_adds_up(server: RunningServer):
    times = ask(server).model_extra["performance"]
    assert times["total_time"] >= times["time_to_first_token"] >= times["prefill_time"] > 0
    assert times["decode_time"] > 0
    assert times["tokens_per_second"] == pytest.approx(23 / times["decode_time"], rel=0.01)
    last = list(ask(server, stream=True))[-1]
    assert last.model_extra["performance"].keys() == times.keys()


def test_a_client_that_leaves_frees_its_sequence_on_every_rank(server: RunningServer):
    stream = ask(server, stream=True, max_tokens=1900)
    next(iter(stream))
    assert server.health()["requests"]["running"] == 1
    stream.close()
    idle = {"running": 0, "waiting": 0}
    server.wait_until(lambda health: health["requests"] == idle, "idle", timeout_s=10)
    freed = lambda health: all(rank["kv_cache_bytes"] == rank["prefix_cache_bytes"] for rank in health["ranks"])  # noqa: E731
    server.wait_until(freed, "freed", timeout_s=10)


def test_health_tells_what_each_rank_holds(server: RunningServer):
    health = server.health()
    assert health["status"] == "ready"
    layers = [rank["layers"] for rank in health["ranks"]]
    assert layers[0][0] == 0
    assert layers[-1][1] == 4
    assert all(before[1] == after[0] for before, after in pairwise(layers))
    assert [rank["rank"] for rank in health["ranks"]] == list(range(int(server.environ["RING_SIZE"])))
    for rank in health["ranks"]:
        assert {"host", "pid", "memory_bytes", "kv_cache_bytes", "kv_cache_bytes_limit"} <= rank.keys()
        assert {"busy_s", "idle_s", "bubble_s"} <= rank["counters"].keys()


def test_the_sdk_finds_the_model(sdk: OpenAI, server: RunningServer):
    assert [model.id for model in sdk.models.list()] == [server.model]
    assert sdk.models.retrieve(server.model).id == server.model
    with pytest.raises(NotFoundError):
        sdk.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"messages": []}, "empty_array"),
        ({"messages": [{"role": "user", "content": "one " * 5000}]}, "context_length_exceeded"),
        ({"max_tokens": 4000}, "context_length_exceeded"),
        ({"logit_bias": {"512": 1}}, "invalid_value"),
        ({"temperature": 5}, "decimal_above_max_value"),
        ({"store": True}, "unsupported_parameter"),
        ({"extra_body": {"frobnicate": True}}, "unknown_parameter"),
    ],
)
def test_the_sdk_raises_what_it_raises_at_openai(server: RunningServer, fields: dict[str, Any], code: str):
    with pytest.raises(BadRequestError) as raised:
        ask(server, **fields)
    assert raised.value.code == code
    assert text_of(ask(server, max_tokens=1)) is not None  # and the server goes on


def health_with_key(server: RunningServer) -> dict[str, Any]:
    return httpx.get(f"{server.url}/health", headers={"authorization": "Bearer secret"}).json()


def test_keys_and_the_queue_s_limit_hold_on_a_real_server(running_server: StartServer):
    server = running_server(RING_SIZE=1, API_KEYS="me:secret", MAX_CONCURRENT_REQUESTS=1, MAX_QUEUED_REQUESTS=1)
    fields: Any = {"model": server.model, "messages": HELLO, "temperature": 0}
    with pytest.raises(AuthenticationError):
        server.client().chat.completions.create(**fields)
    sdk = server.client(api_key="secret")
    stream = sdk.chat.completions.create(**fields, max_tokens=1900, stream=True)
    next(iter(stream))
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(lambda: sdk.chat.completions.create(**fields, max_tokens=2))
        full = {"running": 1, "waiting": 1}
        server.wait_until(lambda _: health_with_key(server)["requests"] == full, "full", timeout_s=10)
        with pytest.raises(RateLimitError) as raised:
            sdk.chat.completions.create(**fields, max_tokens=2)
        assert int(raised.value.response.headers["retry-after"]) > 0
        stream.close()
        assert waiting.result(timeout=30).usage.completion_tokens <= 2


def test_an_idle_server_uses_next_to_no_cpu(running_server: StartServer):
    server = running_server(RING_SIZE=2)
    ask(server, max_tokens=2)
    assert server.process is not None
    api = psutil.Process(server.process.pid)
    family = [api, *api.children(recursive=True)]

    def used() -> dict[str, float]:
        return {" ".join(process.cmdline())[:120]: sum(process.cpu_times()[:2]) for process in family}

    time.sleep(0.5)
    before, began = used(), time.monotonic()
    time.sleep(3)
    spent = {name: seconds - before[name] for name, seconds in used().items()}
    # A process that spins would make it 1 or more.
    assert sum(spent.values()) / (time.monotonic() - began) < 0.1, spent
