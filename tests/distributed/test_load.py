"""Loading a stage: the same numbers as the unsplit model, and no byte or file more than it needs."""

import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from distributed.errors import ModelError
from distributed.model_files import inspect_model
from distributed.partition import LayerRange
from distributed.shard.load import load_lazily, load_stage, write_stand_in
from tests.distributed.model_folders import weight_files, write_folder

# Large enough that weights, not book-keeping, are what is measured: 8 layers of 3.7 MB, embeddings and head of 1 MB.
LARGE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1024, "num_hidden_layers": 8}


def in_the_hubs_cache(tmp_path, **changes):
    """A folder that counts as a snapshot of the Hub, so that weight files may be absent, and its whole model."""
    folder = tmp_path / "models--tiny--llama" / "snapshots" / ("0" * 40)
    return folder, write_folder(folder, **changes)


def without_files(folder, info, names):
    """What inspection says of a snapshot of which these files are not here (their headers came from the Hub)."""
    for name in names:
        (folder / name).unlink()
    return info


def test_stages_one_after_the_other_give_the_logits_of_the_whole_model(tmp_path):
    whole = write_folder(tmp_path / "tiny")
    info = inspect_model(tmp_path / "tiny")
    token_ids = mx.array([[1, 2, 3, 4]])
    message = None
    for layer_range in (LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4)):
        stage = load_stage(info, layer_range)
        message = stage(token_ids, message, stage.make_cache())
    assert mx.array_equal(message, whole(token_ids))


def test_a_stage_loads_although_the_files_of_the_others_are_absent(tmp_path):
    folder, whole = in_the_hubs_cache(tmp_path)
    files = weight_files(folder)
    info = inspect_model(folder)
    token_ids = mx.array([[5, 6, 7]])
    kept = {name: (folder / name).read_bytes() for name in files}
    message = None
    for layer_range, here in ((LayerRange(0, 2), files[:2]), (LayerRange(2, 4), files[2:])):
        for name in files:
            (folder / name).unlink(missing_ok=True)
            if name in here:
                (folder / name).write_bytes(kept[name])
        stage = load_stage(info, layer_range)
        message = stage(token_ids, message, stage.make_cache())
    assert mx.array_equal(message, whole(token_ids))


def test_a_weight_that_is_not_here_is_an_error_and_never_zeros(tmp_path):
    folder, _ = in_the_hubs_cache(tmp_path)
    info = without_files(folder, inspect_model(folder), weight_files(folder)[:1])
    with pytest.raises(RuntimeError, match="read"):
        mx.eval(load_lazily(info)(mx.array([[1]])))
    with pytest.raises(ModelError, match="cannot read the model"):
        load_stage(info, LayerRange(0, 2))


def test_a_config_that_speaks_of_fewer_layers_than_the_model_has_is_an_error(tmp_path):
    """The ring would get ready, and end at its first request: its last rank would not be the last stage."""
    write_folder(tmp_path / "tiny")
    info = replace(inspect_model(tmp_path / "tiny"), num_layers=3)
    with pytest.raises(ModelError, match=r"config\.json says that the model has 3 layers, but mlx-lm makes 4 of it"):
        load_stage(info, LayerRange(1, 3))


def test_weight_files_may_have_names_that_mlx_lm_does_not_look_for(tmp_path):
    whole = write_folder(tmp_path / "tiny", prefix="weights")
    stage = load_stage(inspect_model(tmp_path / "tiny"), LayerRange(0, 4))
    token_ids = mx.array([[1, 2]])
    assert mx.array_equal(stage(token_ids, None, stage.make_cache()), whole(token_ids))


def test_a_stand_in_takes_no_disk(tmp_path):
    write_folder(tmp_path / "tiny", **LARGE)
    file = inspect_model(tmp_path / "tiny").weight_files[0]
    write_stand_in(tmp_path / "stand_in", file)
    written = (tmp_path / "stand_in").stat()
    assert written.st_size > file.total_bytes > 4_000_000
    assert written.st_blocks * 512 < 100_000


@pytest.mark.parametrize("layer_range", [LayerRange(0, 4), LayerRange(2, 5), LayerRange(4, 8), LayerRange(0, 8)])
def test_a_stage_holds_what_was_planned_and_peaks_little_above_it(tmp_path, layer_range):
    write_folder(tmp_path / "tiny", **LARGE)
    info = inspect_model(tmp_path / "tiny")
    gc.collect()  # models are cycles: none of another test may be freed in between
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    stage = load_stage(info, layer_range)
    held, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    assert held == pytest.approx(info.stage_bytes(layer_range), rel=0.02)
    assert peak < 1.3 * held
    assert stage.layer_range == layer_range


def test_an_architecture_whose_values_are_missing_is_a_clear_error(tmp_path):
    write_folder(tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.json"
    config.write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    with pytest.raises(ModelError, match=r"mlx-lm cannot load the model in .*model_type llama"):
        load_stage(inspect_model(tmp_path / "tiny"), LayerRange(0, 4))


def test_a_model_with_code_of_its_own_needs_trust_remote_code(tmp_path):
    write_folder(tmp_path / "tiny", model_file="own.py")
    (tmp_path / "tiny" / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    info = inspect_model(tmp_path / "tiny")
    with pytest.raises(ModelError, match="trust"):
        load_stage(info, LayerRange(0, 4))
    assert load_stage(info, LayerRange(0, 4), trust_remote_code=True).num_layers == 4
