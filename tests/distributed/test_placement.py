"""Plans of whole rings: what each rank would hold, whether that fits, and how evenly a step is shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.errors import PartitionError
from distributed.layer_times import RingTimes, StageTimes
from distributed.model_files import ModelInfo, inspect_model
from distributed.partition import LayerRange
from distributed.placement import check_fits, imbalance, plan_stages, shares
from tests.distributed.model_folders import write_folder


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    """12 equal layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_folder(folder, num_hidden_layers=12)
    return inspect_model(folder)


def timed(seconds: list[list[float]], others: list[float], hosts: list[str]) -> RingTimes:
    """What ranks on `hosts` measured, layer after layer."""
    starts = [sum(map(len, seconds[:rank])) for rank in range(len(seconds))]
    return RingTimes("hash", hosts, [StageTimes(*parts) for parts in zip(starts, seconds, others, strict=True)])


def lengths(plans) -> list[int]:
    return [len(plan.layer_range) for plan in plans]


def test_a_plan_counts_all_weights_and_fits(info: ModelInfo):
    plans = plan_stages(info, 3, [10_000_000] * 3, 1_000_000)
    assert sum(plan.weight_bytes for plan in plans) == info.stage_bytes(LayerRange(0, 12))
    assert all(plan.fits for plan in plans)
    assert plans[0].kv_tokens == 1_000_000 // (info.kv_bytes_per_token_layer * len(plans[0].layer_range))
    check_fits(plans)


def test_a_plan_that_does_not_fit_is_shown_and_refused_with_the_keys_to_change(info: ModelInfo):
    plans = plan_stages(info, 2, [10_000_000, 1_000_000], 2_000_000)
    assert [plan.fits for plan in plans] == [True, False]
    with pytest.raises(PartitionError, match=r"^Rank 1 has 1 MiB.*KV_CACHE_RESERVED_MEMORY_MB.*WORKER_HOSTS"):
        check_fits(plans)


def test_a_plan_follows_an_explicit_split(info: ModelInfo):
    plans = plan_stages(info, 2, None, 0, layer_split=[9, 3])
    assert lengths(plans) == [9, 3]
    with pytest.raises(PartitionError, match="adds up to 13"):
        plan_stages(info, 2, None, 0, layer_split=[9, 4])


def test_without_times_the_bytes_of_layers_and_head_are_spread_evenly(info: ModelInfo):
    plans = plan_stages(info, 3, None, 0)
    assert sum(plan.step_cost for plan in plans) == sum(info.layer_bytes) + info.last_stage_bytes / 4
    assert max(lengths(plans)) - min(lengths(plans)) <= 1


def test_a_head_that_takes_as_long_as_eight_layers_moves_one_of_them_since_prompts_do_without_it(info: ModelInfo):
    times = timed([[1.0] * 6, [1.0] * 6], [0.0, 8.0], ["here", "here"])
    plans = plan_stages(info, 2, None, 0, times=times)
    assert lengths(plans) == [7, 5]
    assert (shares(plans), imbalance(plans)) == ([0.5, 0.5], 1.0)


def test_a_machine_that_was_twice_as_fast_gets_twice_the_layers(info: ModelInfo):
    times = timed([[2.0] * 6, [1.0] * 6], [0.0, 0.0], ["old", "new"])
    assert lengths(plan_stages(info, 2, None, 0, times=times)) == [4, 8]


def test_memory_wins_over_balance(info: ModelInfo):
    times = timed([[2.0] * 6, [1.0] * 6], [0.0, 0.0], ["old", "new"])
    room = 5 * info.layer_bytes[0] + info.last_stage_bytes
    plans = plan_stages(info, 2, [10**9, 1000 + room], 1000, times=times)
    assert lengths(plans) == [7, 5]
    assert all(plan.fits for plan in plans)
    assert imbalance(plans) == pytest.approx(14 / 9.5)


def test_an_explicit_split_is_kept_and_its_balance_told(info: ModelInfo):
    times = timed([[1.0] * 6, [1.0] * 6], [0.0, 0.0], ["here", "here"])
    plans = plan_stages(info, 2, None, 0, layer_split=[9, 3], times=times)
    assert lengths(plans) == [9, 3]
    assert (shares(plans), imbalance(plans)) == ([0.75, 0.25], 1.5)


def test_a_ring_of_one_holds_everything(info: ModelInfo):
    (plan,) = plan_stages(info, 1, None, 0)
    assert plan.weight_bytes == info.bytes_besides_layers(is_first=True, is_last=True) + sum(info.layer_bytes)
    assert imbalance([plan]) == 1


def test_tied_embeddings_are_counted_once_where_one_rank_is_both_ends(tmp_path: Path):
    write_folder(tmp_path / "tied", tie_word_embeddings=True)
    tied = inspect_model(tmp_path / "tied")
    exactly = sum(tied.layer_bytes) + tied.last_stage_bytes
    assert plan_stages(tied, 1, [exactly], 0)[0].fits
    assert not plan_stages(tied, 1, [exactly - 1], 0)[0].fits
