"""What agents send, as it came from them over the wire (shortened): it is served as it stands."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.api.served_app import run, served

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}},
    "required": ["command"],
    "additionalProperties": False,
}
LONG = {"max_sequence_length": 4096}
MARK = {"type": "ephemeral"}
CLAUDE_CODE = {
    "model": "tiny",
    "max_tokens": 24,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "<system-reminder>"}, {"type": "text", "text": "hi"}]},
        {"role": "system", "content": "Available agent types: general"},  # the tiny template takes none here
        {"role": "assistant", "content": [{"type": "text", "text": "ho"}]},
        {"role": "user", "content": [{"type": "text", "text": "and now?", "cache_control": MARK}]},
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197"},
        {"type": "text", "text": "You are an agent.", "cache_control": MARK},
    ],
    "tools": [{"name": "Bash", "description": "Runs.", "input_schema": SCHEMA, "eager_input_streaming": True}],
    "metadata": {"user_id": '{"device_id":"1"}'},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}
TEXT = [{"type": "input_text", "text": "text"}]
CODEX = {  # 0.171.0, as docs/examples.md sets it
    "model": "tiny",
    "input": [
        {"type": "message", "id": "msg_1", "role": "developer", "content": TEXT},
        {"type": "message", "id": "msg_2", "role": "developer", "content": TEXT},
        {"type": "message", "id": "msg_3", "role": "user", "content": TEXT},
        {"type": "message", "id": "msg_4", "role": "user", "content": TEXT},
    ],
    "tools": [{"type": "function", "name": "exec_command", "strict": False, "parameters": SCHEMA}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a221be",
    "client_metadata": {"session_id": "1"},
}


@pytest.mark.parametrize(
    ("path", "body", "unknown_fields", "ignored", "end"),
    [
        ("/v1/messages?beta=true", CLAUDE_CODE, "reject", None, "event: message_stop"),
        ("/v1/responses", CODEX, "warn", "client_metadata", "event: response.completed"),
    ],
    ids=["Claude Code", "Codex"],
)
def test_an_agent_is_served(
    tmp_path: Path,
    tiny_chat_model: Path,
    path: str,
    body: dict[str, Any],
    unknown_fields: str,
    ignored: str | None,
    end: str,
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG, unknown_fields=unknown_fields) as app:
            asking = asyncio.create_task(app.http.post(path, json=body))
            await app.answer("hi")
            response = await asking
            assert response.status_code == 200, response.text
            assert response.headers.get("x-ignored-fields") == ignored
            assert end in response.text

    run(test())
