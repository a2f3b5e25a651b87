"""Logprobs of stages against log_softmax of the unsplit model's logits: every kind of cache, chunks, packs and batches.

The ring is that of test_stage, in one process; test_draws_ring.py has a real one.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from server.frame import Admit, Frame, Join, Leave, Row
from server.kv_budget import MIB, KVBudget
from server.logprobs import Logprobs
from server.protocol import SamplingParams, Submit, TokenLogprobs
from tests.distributed.tiny_models import build
from tests.server.test_stage import PENALIZED, Ring, Server

PROMPT = [(i * 7 + 3) % 89 for i in range(150)]


def expected(architecture: str, tokens: list[int]) -> np.ndarray:
    """(tokens, vocab_size): how likely each next token is after each of `tokens`."""
    model: Any = build(architecture)
    logits = np.array(model(mx.array([tokens]), cache=make_prompt_cache(model))[0].astype(mx.float32), np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def check(given: TokenLogprobs, likely: np.ndarray, token_id: int, num_top: int) -> None:
    """Ties may come in any order, so the likeliest are compared by how likely they are."""
    assert given.logprob == pytest.approx(likely[token_id], abs=1e-3)
    assert len(given.top_ids) == len(set(given.top_ids)) == num_top
    assert given.top_logprobs == pytest.approx(likely[given.top_ids].tolist(), abs=1e-3)
    assert given.top_logprobs == pytest.approx(sorted(likely, reverse=True)[:num_top], abs=1e-3)


def wanting(name: str, prompt: list[int], logprobs: int | None, prompt_logprobs: int | None, **options: Any) -> Submit:
    sampling = SamplingParams(temperature=0.8, seed=5, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    options = {"max_tokens": 6, "max_tokens_given": True} | options
    return Submit(name, prompt, sampling, stop_token_ids=[], **options)


def check_all(server: Server, architecture: str, requests: list[Submit]) -> None:
    for request in requests:
        name, prompt, wants = request.request_id, request.prompt_token_ids, request.sampling
        tokens = [*prompt, *server.outputs[name]]
        likely = expected(architecture, tokens)
        assert len(server.logprobs[name]) == (0 if wants.logprobs is None else request.max_tokens)
        for index, given in enumerate(server.logprobs[name], len(prompt)):
            check(given, likely[index - 1], tokens[index], wants.logprobs or 0)
        scored = [] if wants.prompt_logprobs is None else list(range(1, len(prompt)))
        assert list(server.prompt_logprobs[name]) == scored
        for index, given in server.prompt_logprobs[name].items():
            check(given, likely[index - 1], tokens[index], wants.prompt_logprobs or 0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mamba2", "llama4_text", "gemma2"])
def test_prompts_and_answers_are_as_likely_as_the_unsplit_model_says(architecture: str):
    requests = [
        wanting("both", PROMPT, 2, 3),
        wanting("answer", PROMPT[1:], 4, None),
        wanting("prompt", PROMPT[2:], None, 0),
        wanting("neither", PROMPT[3:], None, None),
        wanting("own", PROMPT[4:], 0, None),
    ]
    server = Server(Ring(architecture, 2), num_groups=2)
    server.serve(requests)
    check_all(server, architecture, requests)


def test_they_are_the_same_after_a_preemption(monkeypatch: pytest.MonkeyPatch):
    """Each is let in with one block of three, and both want a second one soon."""
    monkeypatch.setattr("server.admission.GROWTH_TOKENS", 8)
    prompts = {"old": (PROMPT * 2)[:240], "young": (PROMPT * 2)[1:241]}
    requests = [wanting(name, prompts[name], 1, 2, max_tokens=30, max_tokens_given=False) for name in prompts]
    ring = Ring("llama", 2)
    ring.budget = KVBudget([stage.cache_cost for stage in ring.stages], 64 * MIB, max_tokens=768)
    server = Server(ring)
    server.serve(requests)
    assert len(server.operations(Admit)) == 3, "the young one twice"
    check_all(server, "llama", requests)


def test_what_the_sampler_does_to_the_logits_does_not_change_how_likely_a_token_is():
    changed = SamplingParams(temperature=0, logit_bias={17: 100.0}, min_tokens=1, repetition_penalty=5.0, logprobs=2)
    ring = Ring("llama", 2)
    ring.run(Frame(0, [Admit(0, 4, changed, stop_token_ids=[3])], [Row(0, 3, 3)]), [[5, 6, 7]])
    _, (drawn, [logprob], [top_ids], [top_logprobs]) = ring.run(Frame(1, [Join(0, [0])], [Row(0, 4)], 0), [[8]])
    assert drawn == [17] and 17 not in top_ids
    check(TokenLogprobs(logprob, top_ids, top_logprobs), expected("llama", [5, 6, 7, 8])[-1], 17, 2)


def test_prompts_in_one_pack_are_scored_without_their_padding():
    prompts = [[5, 6, 7], PROMPT[:20], [9]]
    wants = SamplingParams(prompt_logprobs=1)
    admit = [Admit(index, len(prompt) + 1, wants) for index, prompt in enumerate(prompts)]
    rows = [Row(index, len(prompt), len(prompt)) for index, prompt in enumerate(prompts)]
    ring = Ring("llama4_text", 2)
    _, of_pack = ring.run(Frame(0, [*admit], rows), prompts)
    last_rows = [Row(index, len(prompt) + 1) for index, prompt in enumerate(prompts)]
    _, (_, *of_last) = ring.run(Frame(1, [Join(0, [0, 1, 2])], last_rows, 0), [[3], [4], [5]])
    scored = {"pack": iter(zip(*of_pack, strict=True)), "last": iter(zip(*of_last, strict=True))}
    for prompt, last in zip(prompts, [3, 4, 5], strict=True):
        likely = expected("llama4_text", prompt)
        for index, token_id in enumerate([*prompt[1:], last]):
            frame = "last" if index == len(prompt) - 1 else "pack"
            check(TokenLogprobs(*next(scored[frame])), likely[index], token_id, 1)
    assert all(next(rest, None) is None for rest in scored.values())


def test_a_frame_of_which_nobody_wants_logprobs_gives_none_and_leaves_its_logits_alone():
    logprobs = Logprobs()
    logprobs.admit(0, PENALIZED, 200)
    logprobs.admit(1, SamplingParams(logprobs=1), 200)
    for sequence_id in (0, 1):  # the second one wants them for its answer only
        frame = Frame(0, [], [Row(sequence_id, 100, 100)])
        logits = mx.zeros((1, 100, 50_000_000))  # 20 GB, were they computed
        assert logprobs.of_frame(frame, mx.zeros((1, 100), mx.int32), logits, None) == []


def test_of_a_chunks_logits_only_the_last_row_is_held_until_the_next_and_nothing_after_the_end():
    vocab_size, num_tokens = 50_000, 128
    logprobs = Logprobs()
    logprobs.admit(0, SamplingParams(prompt_logprobs=5), 1000)
    before = mx.get_active_memory()
    frame = Frame(0, [], [Row(0, num_tokens, num_tokens)])
    logits = mx.random.normal((1, num_tokens, vocab_size), key=mx.random.key(0))
    mx.eval(logits)
    mx.reset_peak_memory()
    scored = logprobs.of_frame(frame, mx.zeros((1, num_tokens), mx.int32), logits, None)
    assert [array.shape for array in scored] == [(127,), (127, 5), (127, 5)]
    assert mx.get_peak_memory() - before < 3 * logits.nbytes, "a slice at a time"
    del logits, scored
    assert 4 * vocab_size <= mx.get_active_memory() - before < 2 * 4 * vocab_size
    logprobs.forget(0)
    assert mx.get_active_memory() - before < vocab_size


def test_whoever_leaves_is_forgotten():
    ring = Ring("llama", 2)
    logprobs: Any = ring.stages[-1]._logprobs
    ring.run(Frame(0, [Admit(0, 9, SamplingParams(prompt_logprobs=1))], [Row(0, 3, 3)]), [[5, 6, 7]])
    assert set(logprobs._requests) == {0}
    ring.run(Frame(1, [Leave([0])]))
    assert not logprobs._requests
