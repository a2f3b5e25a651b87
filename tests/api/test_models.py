"""What /v1/models says of the served model, and what paths say that this server does not have."""

from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.api.served_app import run, served
from tests.api.test_app import assert_openai_error


def test_a_model_says_how_long_its_context_is_and_what_it_can_do(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 48}) as app:
            model = (await app.http.get("/v1/models/tiny")).json()
            assert model["context_length"] == model["max_model_len"] == 48
            assert model["capabilities"] == {
                "chat": True, "completions": True, "tools": True, "structured_output": True, "reasoning": False,
                "vision": False, "audio": False, "embeddings": False,
            }  # fmt: skip

    run(test())


@pytest.mark.parametrize("state", ["starting", "restarting", "failed"])
def test_what_only_a_ring_knows_is_null_while_none_is_ready(tmp_path: Path, tiny_chat_model: Path, state: Any):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            app.supervisor.state = state
            answer = await app.http.get("/v1/models")
            assert answer.status_code == 200
            (model,) = answer.json()["data"]
            assert model["id"] == "tiny"
            assert model["context_length"] is model["max_model_len"] is model["capabilities"] is None

    run(test())


def test_the_openai_sdk_reads_models_with_slashes_in_their_names(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with (
            served(tmp_path, tiny_chat_model) as app,
            AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as sdk,
        ):
            (listed,) = [model async for model in sdk.models.list()]
            model = await sdk.models.retrieve(str(tiny_chat_model))
            assert model == listed
            assert (model.id, model.owned_by) == ("tiny", "mlx-ring-server")
            assert model.created > 0
            assert model.model_extra is not None and model.model_extra["max_model_len"] == 64

    run(test())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/moderations"),
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/audio/transcriptions"),
        ("GET", "/v1/files"),
        ("DELETE", "/v1/files/file-1"),
        ("GET", "/v1/files/file-1/content"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/batches/batch-1/cancel"),
        ("GET", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/assistants"),
        ("POST", "/v1/threads/thread-1/runs"),
        ("POST", "/v1/vector_stores"),
        ("GET", "/v1/chat/completions/chatcmpl-1"),
        ("GET", "/v1/chat/completions/chatcmpl-1/messages"),
    ],
)
def test_openai_s_other_paths_say_what_is_served_instead(tmp_path: Path, tiny_chat_model: Path, method: str, path: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            error = assert_openai_error(await app.http.request(method, path), 404, "unknown_url")
            assert path in error["message"]
            assert "text generation only" in error["message"]
            assert "/v1/chat/completions," in error["message"]

    run(test())
