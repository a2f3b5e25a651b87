"""Tests of the generic cut: stages give the logits of the whole model, hold only their share, and send little."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import kimi_k3, llama, qwen3
from mlx_lm.models.cache import make_prompt_cache

from distributed.errors import ModelError, PartitionError
from distributed.partition import LayerRange
from distributed.shard.message import FromCache, StageMessage, pack_message, unpack_message
from distributed.shard.stage_model import StageModel
from tests.distributed.cut_runs import CutModel, WholeModel, batched, cuts, difference, one_sequence
from tests.distributed.tiny_models import build

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "mixtral",
    "phi3",
    "mamba2",
    "qwen3_next",
    "olmo2",
]


REFUSED = {"iquestloopcoder", "nanbeige"}


@pytest.mark.parametrize("run", [one_sequence, batched])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stages_give_the_logits_of_the_whole_model(architecture: str, run: Any) -> None:
    whole = WholeModel(architecture)
    expected = run(whole)
    for cut, starts in cuts(whole.num_layers).items():
        assert difference(expected, run(CutModel(architecture, starts))) == 0, cut


def test_a_quantized_model_is_cut_alike() -> None:
    models = [build("llama") for _ in range(3)]
    for model in models:
        nn.quantize(model, group_size=32, bits=4)
    stages = [StageModel(models[0], LayerRange(0, 1)), StageModel(models[1], LayerRange(1, 4))]
    ids = mx.array([[3, 5, 7]])
    message = stages[0](ids, None, stages[0].make_cache())
    logits = stages[1](ids, message, stages[1].make_cache())
    assert mx.array_equal(logits, models[2](ids, cache=make_prompt_cache(models[2])))


def test_a_single_stage_runs_the_model_as_it_is() -> None:
    assert difference(one_sequence(WholeModel("nanbeige")), one_sequence(CutModel("nanbeige", [0]))) == 0


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_a_model_that_cannot_be_cut_is_refused(architecture: str) -> None:
    with pytest.raises(ModelError, match=f"{architecture} does not call each of its 4 layers once.*on one rank"):
        StageModel(build(architecture), LayerRange(0, 2))


def test_layers_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(PartitionError, match="has 4"):
        StageModel(build("qwen3"), LayerRange(2, 5))


def test_a_stage_tells_a_missing_message_from_one_too_many() -> None:
    first, second = (StageModel(build("qwen3"), LayerRange(*ends)) for ends in ((0, 2), (2, 4)))
    ids = mx.array([[1]])
    message = first(ids, None, first.make_cache())
    with pytest.raises(ValueError, match="takes no message"):
        first(ids, message, first.make_cache())
    with pytest.raises(ValueError, match="takes no message"):
        second(ids, None, second.make_cache())


def test_a_stage_keeps_the_caches_of_its_layers() -> None:
    stage = StageModel(build("qwen3"), LayerRange(1, 3))
    assert len(stage.make_cache()) == 2
    first, again = stage.make_cache(), stage.make_cache()
    assert len({id(cache) for cache in first + again}) == 4


def test_a_cache_that_only_carries_an_offset_takes_two_bytes_a_token() -> None:
    stage = StageModel(build("gemma3_text"), LayerRange(3, 5))  # two sliding layers; the global ones are elsewhere
    _, cache = stage.dry_run()
    assert [type(c).__name__ for c in cache] == ["KVCache", "RotatingKVCache", "RotatingKVCache"]
    assert cache[0].offset == cache[1].offset == 1
    assert cache[0].keys.nbytes + cache[0].values.nbytes == 2 * cache[0].step


@pytest.mark.parametrize("architecture", ["gemma3n", "gemma4_text", "afm7"])
def test_a_message_does_not_grow_with_the_context(architecture: str) -> None:
    """Layers that read keys and values of earlier layers get those of the new tokens only."""
    model = CutModel(architecture, [0, 3, 4])
    first, caches = model.stages[0], model.make_caches()
    sizes = []
    for _ in range(3):
        arrays, _ = pack_message(first(mx.array([[3]]), None, caches[0]))
        sizes.append([array.shape for array in arrays])
        for _ in range(9):
            model.step(mx.array([[5]]), caches)
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_batches_that_mlx_lm_cannot_run_are_known() -> None:
    cannot = {"llama4", "gemma2", "gpt_bigcode", "afm7", "minimax_m3_vl"}
    assert not any(StageModel(build(name), LayerRange(0, 2)).can_batch for name in cannot)
    assert all(StageModel(build(name), LayerRange(0, 2)).can_batch for name in ARCHITECTURES)


# -- messages -----------------------------------------------------------------------------------------------------


def test_messages_survive_the_wire() -> None:
    blocks = kimi_k3.ResidualBlocks(1e-5)
    blocks.append(mx.ones((1, 2, 4)))
    message = StageMessage(
        (mx.zeros((1, 2)), None, [FromCache.VALUES, 2.5, True], {"a": mx.array(3)}, blocks),
        {7: (mx.full((1, 1, 2, 2), 4.0), mx.array([5]))},
        {"topk": mx.array([6]), "none": None},
    )
    arrays, structure = pack_message(message)
    got = unpack_message(json.loads(json.dumps(structure)), arrays)
    assert got.output[1:3] == (None, [FromCache.VALUES, 2.5, True])
    assert got.output[3]["a"].item() == 3 and got.new_kv[7][1].item() == 5 and got.shared["topk"].item() == 6
    assert isinstance(got.output[4], kimi_k3.ResidualBlocks) and got.output[4].inv_rms.shape == (1, 1, 2)  # type: ignore


def test_only_objects_of_mlx_lm_travel() -> None:
    with pytest.raises(ModelError, match="cannot be sent to the next rank"):
        pack_message(StageMessage((mx.array(1), Path("/"))))
    with pytest.raises(ModelError, match="no class of mlx-lm"):
        unpack_message([{"object": "subprocess:Popen", "fields": {"dict": []}}, {"dict": []}, {"dict": []}], [])


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["head of its own", "tied embeddings"])
def lazy_llama(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A function that gives a 40 MB model with nothing of it in memory."""
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=256,
        num_hidden_layers=8,
        intermediate_size=1024,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=4096,
        tie_word_embeddings=request.param,
    )
    path = str(tmp_path / "model.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(llama.Model(args).parameters())))

    def load() -> llama.Model:
        model = llama.Model(args)
        model.load_weights(path)
        return model

    return load


def num_bytes(*parts: Any) -> int:
    return sum(
        weight.nbytes  # type: ignore
        for part in parts
        for _, weight in tree_flatten(part.parameters())
    )


@pytest.mark.parametrize("ends", [(0, 4), (3, 5), (4, 8)])
def test_a_stage_holds_its_share_and_loads_it_with_a_low_peak(lazy_llama: Any, ends: tuple[int, int]) -> None:
    model = lazy_llama()
    share = num_bytes(*model.layers[slice(*ends)])
    if ends[0] == 0 or (ends[1] == 8 and "lm_head" not in model):
        share += num_bytes(model.model.embed_tokens)
    if ends[1] == 8:
        share += num_bytes(model.model.norm, *([model.lm_head] if "lm_head" in model else []))
    gc.collect()  # models of earlier tests
    mx.clear_cache()
    before = mx.get_active_memory()

    stage = StageModel(model, LayerRange(*ends))
    assert mx.get_active_memory() - before < 0.01 * share

    mx.reset_peak_memory()
    stage.load_weights_of_this_stage()
    assert share <= mx.get_active_memory() - before < 1.02 * share
    assert mx.get_peak_memory() - before < 1.3 * share

    message, cache = stage.dry_run()  # the first step reads no further weight
    mx.eval(pack_message(message)[0] if isinstance(message, StageMessage) else message, [c.state for c in cache])
    del message, cache
    mx.clear_cache()
    assert mx.get_active_memory() - before < 1.02 * share


def test_a_step_does_not_copy_the_caches() -> None:
    """Whoever held on to a cache's arrays would make its next update a copy of the whole."""
    stage = StageModel(build("qwen3"), LayerRange(0, 3))
    cache = stage.make_cache()
    for layer_cache in cache:
        layer_cache.update_and_fetch(*[mx.zeros((1, 2, 40_000, 16))] * 2)
    peak = 0
    for _ in range(3):  # the first step lets the caches grow
        mx.eval([c.state for c in cache])
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(pack_message(stage(mx.array([[1]]), None, cache))[0], [c.state for c in cache])
        peak = mx.get_peak_memory() - before
    assert peak < 0.1 * sum(c.nbytes for c in cache)


def test_a_layer_stays_what_it_was() -> None:
    layer = StageModel(build("qwen3"), LayerRange(1, 3)).model.layers[2]  # type: ignore
    assert isinstance(layer, qwen3.TransformerBlock) and type(layer).__name__ == "TransformerBlock"
