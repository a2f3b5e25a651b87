"""vLLM's extension `continue_final_message`: the chat's last message is the beginning of the answer."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.api.served_app import BODY, run, served
from tests.api.test_app import COMPLETIONS, assert_openai_error

BEGUN = {"role": "assistant", "content": "the quick"}
MESSAGES = [*BODY["messages"], BEGUN]
FORMAT = {"type": "json_object"}


def test_the_prompt_ends_where_the_last_message_does(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            body = {**BODY, "messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": False}
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json=body))
            submit = await app.answer(" brown")
            assert app.tokenizer.decode(submit.prompt_token_ids).endswith("assistant\nthe quick")
            assert (await asking).json()["choices"][0]["message"]["content"] == " brown"

    run(test())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": BODY["messages"]}, "continue_final_message"),
        ({"messages": [*BODY["messages"], {"role": "assistant", "content": ""}]}, "continue_final_message"),
        ({"add_generation_prompt": True}, "continue_final_message"),
        ({"response_format": FORMAT}, "continue_final_message"),
        ({"continue_final_message": False, "add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    tmp_path: Path, tiny_chat_model: Path, fields: dict[str, Any], named: str
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            body = {**BODY, "messages": MESSAGES, "continue_final_message": True, **fields}
            error = assert_openai_error(await app.http.post(COMPLETIONS, json=body), 400, "invalid_value")
            assert error["param"] == named

    run(test())
