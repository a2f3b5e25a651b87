"""The embedded model over rings of 1, 2 and 3 processes says what mlx_lm's own generate says on the unsplit model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from api.structured.grammar import json_schema
from distributed.model_files import prepare_model
from server.protocol import SamplingParams
from tests.ring_harness import ROOT, RingUnderTest, python, running_ring

pytestmark = pytest.mark.ring

MAX_TOKENS = 8
RIVER = "The river rose in the night and took the bridge. " * 12
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "List three colours.",
    "Who wrote Hamlet?",
    "Count from one to ten.",
    "What is 12 times 12?",
    "Name a fruit and say what it tastes like.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Write a limerick about a cat.",
    "What is photosynthesis?",
    "Give me a recipe for pancakes.",
    "How many legs does a spider have?",
    RIVER + "Summarise this in one sentence.",
    "def fibonacci(n):",
    "What comes after Monday?",
    "Describe a rainbow.",
    "Is water wet?",
    "Tell me a joke about programmers.",
]
SHARING = [RIVER + question for question in ("What rose?", "What was taken?", "When did it happen?", "What rose?")]


@dataclass(frozen=True)
class Reference:
    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    logprobs: list[list[float]]
    stop_token_ids: list[int]


@pytest.fixture(scope="module")
def reference() -> Reference:
    folder = prepare_model("builtin-f32", ROOT)
    tokenizer = load_tokenizer(folder)
    prompts = [
        list(tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True))
        for question in QUESTIONS + SHARING
    ]
    output = python("-m", "tests.server.reference", str(folder), str(MAX_TOKENS), stdin=json.dumps(prompts))
    return Reference(folder, prompts, **json.loads(output.splitlines()[-1]))


@pytest.fixture(scope="module", params=[1, 2, 3], ids="P={}".format)
def ring(request: pytest.FixtureRequest, reference: Reference):
    size = request.param
    with running_ring(reference.folder, size, prefill_chunk_tokens=64, micro_batch_groups=size) as ring:
        ring.wait_ready()
        yield ring


def ask(ring: RingUnderTest, reference: Reference, indices: list[int], name: str) -> list[list[int]]:
    names = [f"{name}-{index}" for index in indices]
    for index, request_id in zip(indices, names, strict=True):
        ring.submit(request_id, reference.prompts[index], MAX_TOKENS, stop_token_ids=reference.stop_token_ids)
    tokens = ring.collect(*names)
    return [tokens[request_id] for request_id in names]


def test_prompts_one_after_the_other(ring: RingUnderTest, reference: Reference):
    for index, answer in enumerate(reference.answers[:6]):
        assert ask(ring, reference, [index], "alone") == [answer], QUESTIONS[index]


def test_20_prompts_8_at_once(ring: RingUnderTest, reference: Reference):
    for start in range(0, 20, 8):
        indices = [index % 20 for index in range(start, start + 8)]
        assert ask(ring, reference, indices, f"from-{start}") == [reference.answers[index] for index in indices]


def test_prompts_that_share_their_beginning_and_second_turns_start_from_what_is_kept(
    ring: RingUnderTest, reference: Reference
):
    indices = list(range(len(QUESTIONS), len(QUESTIONS + SHARING)))
    before = ring.wait_stats(lambda stats: True).counters.num_cached_tokens
    assert ask(ring, reference, indices, "sharing") == [reference.answers[index] for index in indices]
    assert ask(ring, reference, indices, "again") == [reference.answers[index] for index in indices]
    num_shared = 4 * sum(len(reference.prompts[index]) for index in indices) // 5
    ring.wait_stats(lambda stats: stats.counters.num_cached_tokens - before > num_shared)


def test_logprobs_are_mlx_lm_s_alone_and_in_a_batch(ring: RingUnderTest, reference: Reference):
    indices = list(range(8))
    for together in (indices[:1], indices):
        names = [f"scored-{len(together)}-{index}" for index in together]
        for index, name in zip(together, names, strict=True):
            sampling = SamplingParams(temperature=0.0, logprobs=2)
            options = {"sampling": sampling, "stop_token_ids": reference.stop_token_ids}
            ring.submit(name, reference.prompts[index], MAX_TOKENS, **options)
        outputs = list(ring.outputs(len(names)))
        for index, name in zip(together, names, strict=True):
            scored = [logprobs for output in outputs if output.request_id == name for logprobs in output.logprobs]
            assert [logprobs.logprob for logprobs in scored] == pytest.approx(reference.logprobs[index], abs=1e-3)
            assert [logprobs.top_ids[0] for logprobs in scored] == reference.answers[index], "greedy: the likeliest"


# What the first ring drew, which all others draw as well.
_DRAWN: dict[str, list[int]] = {}
SHAPE = {"type": "object", "properties": {"name": {"type": "string"}, "size": {"enum": ["small", "large"]}}}


def test_seeds_and_grammars_give_the_same_answer_on_any_ring_alone_and_among_others(
    ring: RingUnderTest, reference: Reference
):
    grammar = json_schema(SHAPE | {"required": ["name", "size"]}, strict=True, param="schema")
    requests = {
        "seeded": SamplingParams(temperature=0.9, top_p=0.95, seed=11, presence_penalty=0.4),
        "with a grammar": SamplingParams(temperature=0.8, seed=5, grammar=grammar),
    }

    def submit(name: str, sampling: SamplingParams, index: int) -> None:
        options = {"sampling": sampling, "stop_token_ids": reference.stop_token_ids}
        ring.submit(name, reference.prompts[index], 16, **options)

    for name, sampling in requests.items():
        submit(name, sampling, 7)
        drawn = ring.collect(name)[name]
        assert drawn == _DRAWN.setdefault(name, drawn)
    for other in range(6):
        submit(f"other {other}", SamplingParams(temperature=1.0, seed=other), other)
    for name, sampling in requests.items():
        submit(f"{name}, among others", sampling, 7)
    together = ring.collect(*(f"other {other}" for other in range(6)), *(f"{name}, among others" for name in requests))
    for name in requests:
        assert together[f"{name}, among others"] == _DRAWN[name]


def test_each_rank_holds_its_share_and_loading_never_held_much_more(reference: Reference):
    """LAYER_SPLIT halves the layers: what a rank holds beyond that is the embeddings (both ends: they are tied)."""
    layer_bytes, embedding_bytes = 14_162_688, 49152 * 576 * 4
    with running_ring(reference.folder, 2, layer_split="15,15") as ring:
        for info in ring.wait_ready().ranks:
            assert abs(info.memory_bytes - 15 * layer_bytes - embedding_bytes) < 2_000_000
            assert info.peak_memory_bytes < 1.3 * info.memory_bytes
        assert "time the layers" not in ring.log.read_text(), "who says where the layers go needs no measuring"
