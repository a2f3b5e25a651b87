"""Times that were measured: what they say of layers on machines that never had them, and how they are kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from distributed.layer_times import RingTimes, StageTimes, recall, remember

DENSE, EXPERTS = 10, 1000  # sizes in bytes of two kinds of layers


def ring(*stages: list[float], hosts: list[str], others: list[float] | None = None) -> RingTimes:
    starts = [sum(map(len, stages[:rank])) for rank in range(len(stages))]
    others = others or [0.0] * len(stages)
    return RingTimes("hash", hosts, [StageTimes(*parts) for parts in zip(starts, stages, others, strict=True)])


# -- estimates ---------------------------------------------------------------------------------------------------------


def test_a_machine_is_as_much_slower_with_a_kind_it_never_had_as_with_the_kind_both_had():
    """A dense layer takes a third of one with experts, though it has a hundredth of its bytes."""
    times = ring([1.0, 1.0, 3.0, 3.0], [1.5, 1.5], hosts=["old", "new"], others=[0.1, 0.7])
    costs = times.step_costs([DENSE] * 2 + [EXPERTS] * 4)
    assert costs.layers[0] == pytest.approx([1.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    assert costs.layers[1] == pytest.approx([0.5, 0.5, 1.5, 1.5, 1.5, 1.5])
    assert costs.others == [0.1, 0.7]


def test_speeds_are_compared_along_a_chain_of_machines():
    """The first and the last have no kind in common, but each has one with the machine between them."""
    times = ring([4.0], [2.0, 1.0], [0.5], hosts=["a", "b", "c"])
    costs = times.step_costs([DENSE, DENSE, EXPERTS, EXPERTS])
    assert costs.layers[2] == pytest.approx([1.0, 1.0, 0.5, 0.5])
    assert costs.layers[0] == pytest.approx([4.0, 4.0, 2.0, 2.0])


def test_machines_that_had_no_kind_in_common_are_compared_by_bytes():
    times = ring([1.0], [50.0], hosts=["a", "b"])  # 10 bytes and 20 bytes a second
    costs = times.step_costs([DENSE, EXPERTS])
    assert costs.layers == [pytest.approx([1.0, 100.0]), pytest.approx([0.5, 50.0])]


def test_ranks_of_one_machine_are_equally_fast_and_one_disturbed_layer_counts_little():
    times = ring([1.0, 1.0, 9.0], [1.0, 1.0, 1.0], hosts=["here", "here"])
    assert times.step_costs([DENSE] * 6).layers == [[1.0] * 6] * 2


def test_layers_without_known_weights_have_their_measured_times():
    assert ring([2.0], [1.0], hosts=["a", "b"]).step_costs([0, 0]).layers == [[2.0, 2.0], [1.0, 1.0]]


# -- the file ----------------------------------------------------------------------------------------------------------

TIMES = ring([1.0, 2.0], [3.0], hosts=["10.0.0.1", "10.0.0.2"], others=[0.5, 0.25])


def test_what_is_remembered_is_recalled_for_the_same_model_and_ring_only(tmp_path: Path):
    file = tmp_path / "not there yet" / "times.json"
    remember(file, TIMES)
    assert recall(file, "hash", 3, TIMES.hosts) == TIMES
    assert recall(file, "another", 3, TIMES.hosts) is None
    assert recall(file, "hash", 3, TIMES.hosts[::-1]) is None
    assert recall(file, "hash", 3, [*TIMES.hosts, "10.0.0.3"]) is None
    assert [path.name for path in file.parent.iterdir()] == ["times.json"]


def test_new_times_replace_old_ones_of_the_same_ring_beside_those_of_others(tmp_path: Path):
    file = tmp_path / "times.json"
    for index in range(40):
        remember(file, RingTimes(f"model-{index}", TIMES.hosts, TIMES.stages))
    newer = ring([5.0, 5.0], [5.0], hosts=TIMES.hosts)
    for times in (TIMES, newer):
        remember(file, times)
    assert recall(file, "hash", 3, TIMES.hosts) == newer
    assert recall(file, "model-39", 3, TIMES.hosts) is not None
    assert len(json.loads(file.read_text())) == 16, "the oldest are forgotten"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"null", b'{"a": 1}', b'[{"config_hash": 1}]', b"[[]]", b"[" * 100_000]
)
def test_a_damaged_file_is_ignored_told_of_and_replaced(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "times.json"
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert recall(file, "hash", 3, TIMES.hosts) is None
    assert "measured again" in caplog.text
    remember(file, TIMES)
    assert recall(file, "hash", 3, TIMES.hosts) == TIMES


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    remember(tmp_path / "file" / "times.json", TIMES)
    assert "could not keep the measured times" in caplog.text


@pytest.mark.parametrize(
    "stages",
    [
        [StageTimes(0, [1.0, 2.0]), StageTimes()],
        [StageTimes(0, [1.0, 2.0]), StageTimes(1, [3.0])],
        [StageTimes(0, [1.0, 2.0, 3.0])],
        [StageTimes(0, [1.0, 0.0]), StageTimes(2, [3.0])],
        [StageTimes(0, [1.0, -2.0]), StageTimes(2, [3.0])],
        [StageTimes(0, [1.0, 2.0]), StageTimes(2, [3.0], -1.0)],
        [StageTimes(0, [1.0, 2.0]), StageTimes(2, [3.0], float("inf"))],
    ],
)
def test_times_that_cannot_be_of_all_layers_are_not_used(stages: list[StageTimes], tmp_path: Path):
    times = RingTimes("hash", TIMES.hosts, stages)
    assert not times.is_whole(3)
    remember(tmp_path / "times.json", times)
    assert recall(tmp_path / "times.json", "hash", 3, TIMES.hosts) is None


def test_numbers_that_json_does_not_know_are_damage(tmp_path: Path):
    file = tmp_path / "times.json"
    record: dict[str, Any] = {"config_hash": "hash", "hosts": ["a"], "stages": [{"start": 0, "layers": [float("nan")]}]}
    file.write_text(json.dumps([record]))
    assert recall(file, "hash", 1, ["a"]) is None
