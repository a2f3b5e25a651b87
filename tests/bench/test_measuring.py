"""What the benchmarks make of what they measured: rates, gaps, ratios, prompts and dressed models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from bench.beside import Disturbance
from bench.client import Answer, steady_tokens_per_second, tokens_per_second
from bench.figures import cell, median, median_ratio, percentile
from bench.long_prompts import fair_wait, interpolated
from bench.models import dress_as_qwen2
from bench.prompts import Prompts
from bench.simulated_ring import NUM_LAYERS, layer_split, rate
from bench.stages import Spent, stages_table


def answer(started: float, *arrivals: float) -> Answer:
    return Answer(started, list(arrivals), ended=arrivals[-1], num_tokens=len(arrivals))


def test_percentiles_are_values_that_were_measured():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1.0, 3.0, 5.0, 5.0]
    assert math.isnan(percentile([], 50))


def test_a_ratio_is_taken_round_by_round_and_rounds_without_figures_are_left_out():
    assert median_ratio([1.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0
    assert median([math.nan, 4.0]) == 4.0
    assert cell(median([math.nan])) == "–"


def test_the_time_before_the_first_token_counts_in_tokens_per_second():
    assert tokens_per_second([answer(0.0, 2.0, 3.0, 4.0), answer(0.0, 3.0, 4.0, 5.0)]) == pytest.approx(6 / 5)


def test_steady_tokens_per_second_count_only_while_all_streams_run():
    first, second = answer(0.0, 1.0, 2.0, 3.0, 4.0), answer(0.0, 2.0, 3.0, 4.0, 5.0)
    assert steady_tokens_per_second([first, second]) == pytest.approx(4 / 2)
    assert math.isnan(steady_tokens_per_second([answer(0.0, 1.0, 2.0), answer(0.0, 3.0, 4.0)]))


def test_the_gap_factor_compares_gaps_before_and_while_a_prompt_is_read():
    stream = answer(0.0, 1.0, 2.0, 3.0, 6.0, 9.0, 10.0)
    disturbance = Disturbance(answer(3.0, 9.0), stream.gaps_between(0.0, 3.0), stream.gaps_between(3.0, 9.0))
    assert (disturbance.before, disturbance.during) == ([1.0, 1.0], [3.0, 3.0])
    assert disturbance.gap_factor == disturbance.mean_gap_factor == 3.0


def test_the_wait_at_a_gap_factor_lies_between_the_points_that_were_measured():
    assert interpolated([(3.0, 1.5), (2.0, 2.0)], 2.5) == pytest.approx(1.75)
    assert math.isnan(interpolated([(3.0, 1.5), (2.0, 2.0)], 5.0))
    assert fair_wait(2.5) == pytest.approx(5 / 3)


def test_tokens_of_the_first_moment_were_made_before_it():
    assert rate([(1.0, 4), (2.0, 4), (3.0, 4)]) == pytest.approx(8 / 2)


@pytest.mark.parametrize("ranks", [1, 5, 8])
def test_every_layer_is_on_one_rank(ranks: int):
    split = layer_split(ranks)
    assert len(split) == ranks and sum(split) == NUM_LAYERS and max(split) - min(split) <= 1


def test_a_prompt_has_the_length_asked_for_and_shares_no_start_with_another(tiny_chat_model: Path):
    prompts = Prompts(tiny_chat_model)
    one, other = prompts.of_length(300, "one"), prompts.of_length(300, "other")
    assert prompts.of_length(300, "one") == one
    assert 280 <= prompts.count(one) <= 300
    assert one[0]["content"].split()[0] != other[0]["content"].split()[0]


def test_a_llama_dressed_as_qwen2_computes_the_same(tiny_chat_model: Path, tmp_path: Path):
    dressed = dress_as_qwen2(tiny_chat_model, tmp_path / "dressed")
    token_ids = mx.array([[1, 5, 9, 2, 300]])
    logits = [load_model(folder)[0](token_ids) for folder in (tiny_chat_model, dressed)]
    assert json.loads((dressed / "config.json").read_text())["model_type"] == "qwen2"
    assert mx.allclose(*logits, rtol=0, atol=1e-6)


def test_what_ranks_did_is_told_apart_by_waiting_and_by_slower_steps():
    before = [Spent((0, 30), 1.0, 0.0, 10)], [Spent((0, 16), 1.0, 1.0, 10), Spent((16, 30), 1.0, 1.0, 10)]
    after = [Spent((0, 30), 3.0, 0.0, 30)], [Spent((0, 16), 2.0, 4.0, 30), Spent((16, 30), 5.0, 1.0, 30)]
    spent = {f"P = {len(ranks)}": [a.since(b) for a, b in zip(ranks, old)] for ranks, old in zip(after, before)}
    lines = stages_table(spent).splitlines()
    assert lines[2] == "| P = 1 | 0 | [0, 30) | 100% | 100.0 | 1.00 |"
    assert lines[3] == "| P = 2 | 0 | [0, 16) | 25% | 50.0 | 2.50 |"
    assert lines[4] == "|  | 1 | [16, 30) | 100% | 200.0 |  |"
