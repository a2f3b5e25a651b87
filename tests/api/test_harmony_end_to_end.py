"""A tiny gpt-oss with harmony's tokens on a real ring: what its requests enforce is enforced by the last rank.

Its weights are random, so all that makes sense in an answer is the grammar's. A bias makes its reasoning short.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt_oss

from api.tokenizer import ChatTokenizer
from tests.api.chat.template_models import harmony_model
from tests.conftest import StartServer
from tests.distributed.tiny_models import COMMON, TINY
from tests.running_server import RunningServer
from tests.tiny_chat_model import CONTEXT

pytestmark = pytest.mark.ring

HELLO: Any = [{"role": "user", "content": "hello world"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "now": {"type": "boolean"}},
    "required": ["city", "now"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Of a whole model folder."""
    folder = tmp_path_factory.mktemp("models") / "gpt-oss"
    num_tokens = len(harmony_model(tiny_chat_model, folder)._tokenizer)
    changes = {"model_type": "gpt_oss", "vocab_size": num_tokens, "max_position_embeddings": CONTEXT}
    config = COMMON | TINY["gpt_oss"] | changes
    mx.random.seed(0)
    model = gpt_oss.Model(gpt_oss.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return ChatTokenizer(folder)


@pytest.fixture(scope="module")
def server(tokenizer: ChatTokenizer, running_server: StartServer) -> RunningServer:
    return running_server(RING_SIZE=2, MODEL_REPO=tokenizer.path, MODEL_NAME="tiny-gpt-oss")


@pytest.fixture(scope="module")
def short_thoughts(tokenizer: ChatTokenizer) -> dict[str, float]:
    """A logit_bias under which every fourth token or so ends a message, where one may end."""
    (end,) = tokenizer.encode_prompt("<|end|>", add_special_tokens=False)
    return {str(end): 5.0}


def ask(server: RunningServer, **fields: Any) -> Any:
    fields = {"model": server.model, "max_tokens": 600, "temperature": 1, "seed": 7, **fields}
    return server.client().chat.completions.create(messages=HELLO, **fields)


def is_a_place(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"city", "now"} and value["city"] in ("Oslo", "Rome") and isinstance(value["now"], bool)


def test_content_fits_its_schema_behind_reasoning(server: RunningServer, short_thoughts: dict[str, float]):
    answer = ask(server, response_format=FORMAT, logit_bias=short_thoughts, n=6)
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and is_a_place(choice.message.content)
    assert any(getattr(choice.message, "reasoning_content", None) for choice in answer.choices)
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = list(ask(server, response_format=FORMAT, logit_bias=short_thoughts, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == answer.choices[0].message.content


def test_a_required_call_is_made_and_fits(server: RunningServer, short_thoughts: dict[str, float]):
    answer = ask(server, tools=TOOLS, tool_choice="required", logit_bias=short_thoughts, n=6)
    called = set()
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls
        called.add(call.function.name)
        assert (
            is_a_place(call.function.arguments) if call.function.name == "weather" else call.function.arguments == "{}"
        )
    assert called == {"weather", "now"}
    named = {"type": "function", "function": {"name": "weather"}}
    choice = ask(server, tools=TOOLS, tool_choice=named, reasoning_effort="none").choices[0]
    assert choice.finish_reason == "stop" and is_a_place(choice.message.tool_calls[0].function.arguments)
    assert getattr(choice.message, "reasoning_content", None) is None


def test_other_endpoints_enforce_it_too(server: RunningServer):
    response = server.client().responses.create(
        model=server.model,
        input="hello world",
        reasoning={"effort": "none"},
        text={"format": {"type": "json_schema", "name": "place", "strict": True, "schema": SCHEMA}},
    )
    assert is_a_place(response.output_text) and [item.type for item in response.output] == ["message"]
    body = {
        "model": server.model,
        "max_tokens": 200,
        "messages": HELLO,
        "thinking": {"type": "disabled"},
        "tools": [{"name": "weather", "input_schema": SCHEMA, "strict": True}],
        "tool_choice": {"type": "any"},
    }
    message = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60).json()
    (block,) = message["content"]
    assert (block["name"], message["stop_reason"]) == ("weather", "tool_use")
    assert is_a_place(json.dumps(block["input"]))


def test_without_reasoning_an_answer_is_text(server: RunningServer):
    choice = ask(server, reasoning_effort="none", max_tokens=40).choices[0]
    assert choice.message.content and getattr(choice.message, "reasoning_content", None) is None
