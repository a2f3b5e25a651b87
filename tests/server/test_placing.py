"""Rank 0's decisions at start-up: guess, measure, split again where that pays, and remember."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from config import load_config
from distributed.errors import PartitionError
from distributed.layer_times import StageTimes, recall, times_file
from distributed.model_files import ModelInfo, inspect_model
from distributed.partition import LayerRange
from distributed.ring import Ring
from distributed.shard.stage_model import StageModel
from server.placing import Placing, Split
from tests.distributed.model_folders import write_folder
from tests.distributed.tiny_models import build
from tests.ring_harness import running_ring

GIB = 2**30
HOSTS = ("10.0.0.1", "10.0.0.2")


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    """12 equal layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_folder(folder, num_hidden_layers=12)
    return inspect_model(folder)


def placing(info: ModelInfo, root: Path, *, rank: int = 0, hosts: tuple[str, ...] = HOSTS, **keys: Any) -> Placing:
    settings = load_config(root, {"RING_SIZE": str(len(hosts)), "KV_CACHE_RESERVED_MEMORY_MB": "1", **keys})
    ring = Ring(rank, len(hosts), hosts, None)
    return Placing(info, settings, [GIB] * len(hosts), ring, hosts, root)


def as_measured(split: Split, seconds: list[float]) -> list[StageTimes]:
    """What ranks that take `seconds` for each layer measure of a split."""
    return [StageTimes(start, [took] * (end - start)) for (start, end), took in zip(split.ranges, seconds, strict=True)]


def test_the_first_start_measures_and_splits_again_and_the_second_knows(
    info: ModelInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    first = placing(info, tmp_path)
    guess = first.split()
    assert guess.is_guess and "by the bytes a step reads" in caplog.text
    better = first.split_again(guess, as_measured(guess, [0.002, 0.001]))
    assert better == Split([(0, 4), (4, 12)])
    said = "layers [0, 4) and [4, 12): by measured times, slowest stage 8.0 ms of 16.0 ms a step"
    assert said in caplog.text
    caplog.clear()
    assert placing(info, tmp_path).split() == better
    assert said in caplog.text


def test_a_split_that_is_hardly_better_is_not_loaded_but_remembered(
    info: ModelInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    first = placing(info, tmp_path)
    guess = first.split()
    assert first.split_again(guess, as_measured(guess, [0.00101, 0.001])) == guess
    assert "measured times agree with it" in caplog.text
    assert not placing(info, tmp_path).split().is_guess


def test_an_explicit_split_measures_nothing_and_looks_nowhere(
    info: ModelInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    first = placing(info, tmp_path)
    first.split_again(guess := first.split(), as_measured(guess, [0.002, 0.001]))
    assert placing(info, tmp_path, LAYER_SPLIT="6,6").split() == Split([(0, 6), (6, 12)])
    assert "layers [0, 6) and [6, 12): as LAYER_SPLIT says" in caplog.text


def test_a_ring_of_one_measures_nothing(info: ModelInfo, tmp_path: Path):
    settings = load_config(tmp_path, {"RING_SIZE": "1"})
    alone = Placing(info, settings, [4 * GIB], Ring(0, 1, (), None), ["here"], tmp_path)
    assert alone.split() == Split([(0, 12)])


def test_the_cache_s_bits_do_not_matter_to_the_times_and_other_machines_do(info: ModelInfo, tmp_path: Path):
    first = placing(info, tmp_path)
    first.split_again(guess := first.split(), as_measured(guess, [0.002, 0.001]))
    assert not placing(info, tmp_path, KV_CACHE_BITS="8").split().is_guess
    assert placing(info, tmp_path, hosts=HOSTS[::-1]).split().is_guess


def test_memory_that_shrank_since_then_still_binds(info: ModelInfo, tmp_path: Path):
    first = placing(info, tmp_path)
    first.split_again(guess := first.split(), as_measured(guess, [0.002, 0.001]))
    room = 2**20 + 5 * info.layer_bytes[0] + info.last_stage_bytes
    settings = load_config(tmp_path, {"RING_SIZE": "2", "KV_CACHE_RESERVED_MEMORY_MB": "1"})
    tight = Placing(info, settings, [GIB, room], Ring(0, 2, HOSTS, None), HOSTS, tmp_path)
    assert tight.split() == Split([(0, 7), (7, 12)])
    none = Placing(info, settings, [GIB, 2**20], Ring(0, 2, HOSTS, None), HOSTS, tmp_path)
    with pytest.raises(PartitionError, match="Rank 1"):
        none.split()


def test_where_a_rank_could_not_measure_the_loaded_split_stays_and_nothing_is_kept(info: ModelInfo, tmp_path: Path):
    first = placing(info, tmp_path)
    guess = first.split()
    assert first.split_again(guess, [as_measured(guess, [0.001, 0.001])[0], StageTimes()]) == guess
    assert recall(times_file(tmp_path), info.config_hash, 12, HOSTS) is None


def test_ranks_of_one_machine_measure_one_after_the_other_and_machines_together(info: ModelInfo, tmp_path: Path):
    stage = StageModel(build("llama"), LayerRange(0, 2))
    hosts = ("a", "b", "a", "b", "a")
    ranks = [placing(info, tmp_path, rank=rank, hosts=hosts) for rank in range(5)]
    turns = [[bool(rank.measure(turn, stage).layers) for rank in ranks] for turn in range(ranks[0].num_turns)]
    assert turns == [[True, True, False, False, False], [True, True, True, True, False], [True] * 5]


def test_a_stage_that_cannot_be_timed_is_told_of_and_serves(
    info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    stage = StageModel(build("llama"), LayerRange(0, 2))

    def no_rows(num_rows: int = 1) -> None:
        raise ValueError("[broadcast_shapes]")

    monkeypatch.setattr(stage, "example_message", no_rows)
    assert placing(info, tmp_path).measure(0, stage) == StageTimes()
    assert "could not time the layers ([broadcast_shapes])" in caplog.text


# -- a real ring -------------------------------------------------------------------------------------------------------

HEAVY_HEAD = """
import server.placing
from distributed.layer_times import StageTimes

def measured(stage, finish):
    return StageTimes(stage.layer_range.start, [0.001] * len(stage.layer_range), 0.01 if stage.is_last else 0.0)

server.placing.measure_stage = measured
from server.__main__ import main
main()
"""


@pytest.mark.ring
def test_a_ring_loads_again_as_measured_and_the_next_start_knows(tiny_chat_model: Path, tmp_path: Path):
    program = tmp_path / "heavy_head.py"
    program.write_text(HEAVY_HEAD)
    with running_ring(tiny_chat_model, 2, root=tmp_path, program=str(program)) as ring:
        first = ring.wait_ready()
        ring.wait_log("layers [0, 2) and [2, 4): by the bytes a step reads")
        ring.wait_log("layers [0, 3) and [3, 4): by measured times, slowest stage 3.5 ms of 6.5 ms a step")
        assert [info.layers for info in first.ranks] == [(0, 3), (3, 4)]
        ring.submit("split again", [5, 6, 7], 4)
        tokens = ring.collect("split again")["split again"]
    assert times_file(tmp_path).is_file()
    with running_ring(tiny_chat_model, 2, root=tmp_path) as ring:
        assert [info.layers for info in ring.wait_ready().ranks] == [(0, 3), (3, 4)]
        ring.wait_log("by measured times, slowest stage 3.5 ms of 6.5 ms a step")
        assert "time the layers" not in ring.log.read_text()
        ring.submit("at once", [5, 6, 7], 4)
        assert ring.collect("at once")["at once"] == tokens
