"""/tokenize and /detokenize: the same ids that a request would send to the ring, and back."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load

from tests.api.served_app import BODY, run, served
from tests.api.test_app import COMPLETIONS, assert_openai_error
from tests.tiny_chat_model import VOCAB_SIZE

TEXT = "<|im_start|>user\nGrüße, 世界"


def test_a_text_is_counted_and_comes_back(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            answer = (await app.http.post("/tokenize", json={"model": "tiny", "prompt": TEXT})).json()
            ids = load(tiny_chat_model).encode(TEXT)
            assert answer == {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None}
            back = await app.http.post("/detokenize", json={"model": "tiny", "tokens": ids})
            assert back.json() == {"prompt": TEXT}

    run(test())


def test_messages_are_the_prompt_that_a_chat_sends_to_the_ring(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            answer = (await app.http.post("/tokenize", json={"messages": BODY["messages"]})).json()
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json=BODY))
            assert (await app.answer("one")).prompt_token_ids == answer["tokens"]
            await asking

    run(test())


def test_tokens_can_be_named(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asked = {"prompt": "<|im_end|>a世", "return_token_strs": True}
            answer = (await app.http.post("/tokenize", json=asked)).json()
            assert answer["token_strs"] == ["<|im_end|>", "a", "bytes:\\xe4", "bytes:\\xb8", "bytes:\\x96"]

    run(test())


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": BODY["messages"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, 400, "tools"),
        ("/tokenize", {"prompt": "x", "chat_template_kwargs": {}}, 400, "chat_template_kwargs"),
        ("/tokenize", {"prompt": ["x"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x" * 100_000}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "frobnicate": 1}, 400, "frobnicate"),
        ("/tokenize", {"prompt": "x", "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": BODY["messages"], "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [1, VOCAB_SIZE]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [1] * 65}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
def test_what_cannot_be_done_is_named(
    tmp_path: Path, tiny_chat_model: Path, path: str, body: dict[str, Any], status: int, param: str
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            error = assert_openai_error(await app.http.post(path, json=body), status)
            assert error["param"] == param

    run(test())


def test_no_tokens_are_an_empty_text(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            assert (await app.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
            assert (await app.http.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []

    run(test())


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_a_server_that_is_not_ready_answers_503(tmp_path: Path, tiny_chat_model: Path, path: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            app.supervisor.state = "starting"
            body = {"prompt": "x"} if path == "/tokenize" else {"tokens": [1]}
            assert_openai_error(await app.http.post(path, json=body), 503, "server_not_ready")

    run(test())
