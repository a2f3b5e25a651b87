"""Model folders: what is read from them, and what each kind of damage says."""

import json
import struct
from typing import Any

import pytest
from mlx.utils import tree_flatten

from distributed.errors import ModelError, PartitionError
from distributed.memory import configured_limit_bytes, rank_memory_limit_bytes
from distributed.model_files import (
    BROUGHT,
    INDEX,
    ensure_weights,
    inspect_model,
    models_dir,
    prepare_model,
    read_header,
)
from distributed.partition import LayerRange
from distributed.weight_names import WeightNames
from tests.distributed.model_folders import CONFIG, weight_files, write_folder
from tests.distributed.tiny_models import TINY, build


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_json(path, **changes) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: part for key, part in value.items() if part is not None}))


def test_a_model_in_several_files_is_counted_by_layer_and_by_end(folder):
    info = inspect_model(folder)
    hidden, middle, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    layer = 4 * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * middle + 2 * hidden)
    embeddings = 4 * vocab * hidden
    assert info.layer_bytes == (layer,) * 4
    assert (info.first_stage_bytes, info.last_stage_bytes) == (embeddings, embeddings + 4 * hidden)
    assert (info.shared_bytes, info.middle_stage_bytes) == (0, 0)
    assert (info.num_layers, info.vocab_size, info.max_context, info.model_type) == (4, vocab, 128, "llama")
    assert info.kv_bytes_per_token_layer == 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 float32
    in_files = sum(size for file in info.weight_files for size in map(file.size_bytes, file.tensors))
    assert info.stage_bytes(LayerRange(0, 4)) == in_files


def test_tied_embeddings_are_held_by_both_ends_but_once_by_a_single_stage(tmp_path):
    write_folder(tmp_path / "tied", tie_word_embeddings=True)
    info = inspect_model(tmp_path / "tied")
    assert info.shared_bytes == info.first_stage_bytes > 0
    ends = info.stage_bytes(LayerRange(0, 2)) + info.stage_bytes(LayerRange(2, 4))
    assert ends - info.stage_bytes(LayerRange(0, 4)) == info.shared_bytes


def test_a_stage_needs_only_the_files_of_its_layers_and_its_end(folder):
    info, files = inspect_model(folder), weight_files(folder)

    def needed(start: int, end: int) -> list[str]:
        layer_range = LayerRange(start, end)
        return [file.name for file in info.files_of_stage(layer_range, is_first=start == 0, is_last=end == 4)]

    assert needed(0, 1) == files[:1]
    assert needed(1, 3) == files[1:3]
    assert needed(2, 4) == files[2:]


def test_the_config_hash_ignores_spacing_and_order_but_no_value(folder):
    before = inspect_model(folder).config_hash
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    assert inspect_model(folder).config_hash == before
    edit_json(folder / "config.json", rope_theta=20000.0)
    assert inspect_model(folder).config_hash != before


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("model.layers", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]),
        ("transformer.h", ["transformer.wte.weight", "transformer.ln_f.bias", "lm_head.scales"]),
        ("backbone.layers", ["backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"]),
        ("language_model.model.layers", ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]),
    ],
)
def test_the_layer_of_a_weight_is_told_whatever_the_architecture_calls_it(prefix, others):
    layers = [f"{prefix}.{layer}.mlp.experts.{expert}.w1.weight" for layer in range(3) for expert in range(9)]
    vision = [f"vision_tower.encoder.layers.{layer}.attn.weight" for layer in range(20)]
    names = WeightNames.of([*layers, *others, *vision], num_layers=3, tied=False, model_type="any")
    assert {names.layer_of(name) for name in layers} == {0, 1, 2}
    assert {names.layer_of(name) for name in [*others, *vision]} == {None}
    ends = {"is_first": True, "is_last": True}
    assert not any(names.is_needed(name, LayerRange(0, 3), **ends) for name in vision)
    assert not any(names.is_needed(name, None, is_first=False, is_last=False) for name in others)
    assert all(names.is_needed(name, None, **ends) for name in others)
    assert names.is_needed(others[0], None, is_first=True, is_last=False)
    assert not names.is_needed(others[0], None, is_first=False, is_last=True)


def test_middle_stages_need_the_embeddings_where_the_architecture_says_so():
    weights = ["model.layers.0.mlp.weight", "model.embed_tokens_per_layer.weight", "model.norm.weight"]
    names = WeightNames.of(weights, num_layers=1, tied=True, model_type="gemma3n")
    in_the_middle = {"is_first": False, "is_last": False}
    assert names.is_needed("model.embed_tokens_per_layer.weight", None, **in_the_middle)
    assert not names.is_needed("model.norm.weight", None, **in_the_middle)


def test_the_layers_of_every_architecture_of_mlx_lm_are_told_by_name():
    told_otherwise = {"afm7"}  # two lists: the second counts as needed by all stages
    for architecture in TINY.keys() - told_otherwise:
        try:
            model = build(architecture)
        except ValueError:  # prism_hadamard_qwen35 wants a real checkpoint
            continue
        parameters: list[tuple[str, Any]] = tree_flatten(model.parameters())  # pyright: ignore[reportAssignmentType]
        names = WeightNames.of(dict(parameters), num_layers=None, tied=False, model_type=architecture)
        assert names.num_layers == len(model.layers or []), architecture
        rows = [weight.shape[0] for name, weight in parameters if names.is_embedding(name)]
        assert len(set(rows)) == 1, architecture


def test_the_vocabulary_is_the_embeddings_rows_where_the_config_says_nothing_or_more(folder):
    edit_json(folder / "config.json", vocab_size=None)
    assert inspect_model(folder).vocab_size == CONFIG["vocab_size"]
    edit_json(folder / "config.json", vocab_size=1_000_000)
    assert inspect_model(folder).vocab_size == CONFIG["vocab_size"]


# -- finding the folder ----------------------------------------------------------------------------------------------


def test_a_folder_is_found_absolute_relative_to_the_project_or_brought_to_its_models(folder, tmp_path):
    root = tmp_path / "project"
    write_folder(models_dir(root) / "brought")
    write_folder(root / "near")
    assert prepare_model(str(folder), root) == folder
    assert prepare_model("near", root) == root / "near"
    assert prepare_model("/on/another/machine/brought", root) == models_dir(root) / "brought"


def test_a_worker_takes_the_model_that_was_brought(tmp_path):
    """An older copy at the place that rank 0's machine has it at is nobody's to bring up to date."""
    root = tmp_path / "worker"
    older, brought = tmp_path / "home" / "model", models_dir(root) / "model"
    for folder in (older, brought):
        write_folder(folder)
    assert prepare_model(str(older), root) == older
    (root / BROUGHT).touch()
    assert prepare_model(str(older), root) == brought


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"MODEL_REPO=/no/such/model: there is no such folder"):
        prepare_model("/no/such/model", tmp_path)
    (tmp_path / "a.py").touch()
    with pytest.raises(ModelError, match="it is a file, not a folder"):
        prepare_model(str(tmp_path / "a.py"), tmp_path)


def test_a_folder_of_links_as_in_the_hubs_cache_works(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert inspect_model(linked).layer_bytes == inspect_model(folder).layer_bytes


# -- damage ----------------------------------------------------------------------------------------------------------


def remove_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def remove_model_type(folder):
    edit_json(folder / "config.json", model_type=None)


def unknown_model_type(folder):
    edit_json(folder / "config.json", model_type="llama_of_tomorrow")


def remove_a_weight_file(folder):
    (folder / weight_files(folder)[1]).unlink()


def break_the_index(folder):
    (folder / INDEX).write_text("{}")


def cut_a_header(folder):
    path = folder / weight_files(folder)[2]
    path.write_bytes(path.read_bytes()[:40])


def cut_the_data(folder):
    path = folder / weight_files(folder)[2]
    path.write_bytes(path.read_bytes()[:-100])


def empty_a_file(folder):
    (folder / weight_files(folder)[0]).write_bytes(b"")


def only_pickles(folder):
    (folder / INDEX).unlink()
    for name in weight_files(folder):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def index_names_pickles(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, r"has no config\.json: MODEL_REPO must name"),
        (break_config, r"config\.json cannot be read as JSON .*copy or download"),
        (remove_model_type, r"has no model_type"),
        (unknown_model_type, r"'llama_of_tomorrow', which the installed mlx-lm does not know: choose"),
        (remove_a_weight_file, r"lacks model-00002-of-00004\.safetensors.*copy or download"),
        (break_the_index, r"index\.json is damaged .*copy or download"),
        (cut_a_header, r"model-00003-of-00004\.safetensors is damaged or truncated .*cut off.*copy or download"),
        (cut_the_data, r"model-00003-of-00004\.safetensors is damaged or truncated .*it ends after"),
        (empty_a_file, r"model-00001-of-00004\.safetensors is damaged or truncated"),
        (only_pickles, r"has no model\*\.safetensors \(it has pytorch_model\.bin, which is not loaded"),
        (index_names_pickles, r"only \.safetensors weights are loaded"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong_and_what_to_do(folder, tmp_path, damage, message):
    damage(folder)
    with pytest.raises(ModelError, match=message):
        prepare_model(str(folder), tmp_path)


def test_a_header_that_is_no_object_is_damage(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


def test_a_weight_file_that_vanishes_after_inspection_is_named(folder):
    info = inspect_model(folder)
    (folder / weight_files(folder)[0]).unlink()
    with pytest.raises(ModelError, match="lacks model-00001"):
        ensure_weights(info, LayerRange(0, 2), True, False)


# -- the machine's memory ----------------------------------------------------------------------------------------------


def test_ranks_of_one_machine_share_its_memory_and_the_limit_caps_each():
    assert configured_limit_bytes(3, ()) is None
    assert [configured_limit_bytes(rank, (100, 200)) for rank in (0, 1)] == [100 * 2**20, 200 * 2**20]
    assert rank_memory_limit_bytes(1, 2, (1,)) == 2**20
    assert rank_memory_limit_bytes(0, 4) == pytest.approx(rank_memory_limit_bytes(0, 1) / 4, rel=0.2)
    with pytest.raises(PartitionError, match="RANK_MEMORY_LIMIT_MB has 2 entries"):
        configured_limit_bytes(2, (100, 200))
