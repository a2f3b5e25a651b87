"""KV_CACHE_BITS in a real ring: the text of mlx_lm's own quantized cache, in as much less memory as the bits say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ring_harness import RingUnderTest, python, running_ring
from tests.tiny_chat_model import write_tiny_chat_model

pytestmark = pytest.mark.ring

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [3] * 40, list(range(20, 60)), [9, 8, 7]]
MAX_TOKENS = 12
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 32  # on one rank
TOKEN_BYTES = LAYERS * KV_HEADS * 2 * (HEAD_DIM + 2 * 4)  # 8 bits a number, a float32 scale and bias for each 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=4 * HEAD_DIM)


@pytest.fixture(scope="module")
def reference(model: Path) -> list[list[int]]:
    done = python("-m", "tests.server.reference", str(model), str(MAX_TOKENS), "8,32", stdin=json.dumps(PROMPTS))
    return json.loads(done.splitlines()[-1])["answers"]


@pytest.fixture(scope="module")
def ring(model: Path):
    with running_ring(model, 2, kv_cache_bits=8, prefill_chunk_tokens=16, kv_cache_max_size=2048) as ring:
        for info in ring.wait_ready().ranks:
            assert info.kv_cache_bytes_limit == 2048 * TOKEN_BYTES
        yield ring


def test_greedy_tokens_equal_mlx_lms_on_its_quantized_cache_alone_and_together(
    ring: RingUnderTest, reference: list[list[int]]
):
    ring.submit("alone", PROMPTS[3], MAX_TOKENS)
    assert ring.collect("alone")["alone"] == reference[3]
    lengths = {f"together-{index}": MAX_TOKENS - index for index in range(len(PROMPTS))}
    for index, (name, length) in enumerate(lengths.items()):
        ring.submit(name, PROMPTS[index], length)
    tokens = ring.collect(*lengths)
    assert tokens == {name: reference[index][:length] for index, (name, length) in enumerate(lengths.items())}
