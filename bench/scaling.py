"""Simulated scaling: the real engine on real rings of 1 to 8 ranks whose layers are timed sleeps, and a model beyond.

Shows for each number of ranks what share of the time the stages compute and where the rest goes. The model is given
what a frame took these rings besides computing, and its tokens per second are shown beside theirs; then it is taken to
rings, links and delays that are not on this machine.

    python -m bench.scaling
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import models
from bench.contestants import end_in_order
from bench.environment import heading, table
from bench.figures import cell
from bench.pipeline_model import Cost, Link, Prediction, Ring, predict
from bench.simulated_ring import NUM_LAYERS, ROW_BYTES, Usage, layer_split, measure

REFERENCE_RANKS = 8  # a scenario's costs are those of a stage with this part of the layers
MODELLED_STAGE = Cost(0.002, 0.002)  # 10 ms for 4 rows
MODELLED_RANKS = [1, 2, 4, 8, 16, 32, 64]
LINKS_GBIT = [1, 10, 80]
DELAYS_MS = [0.1, 1.0, 5.0]
ROWS_PER_RANK = 4


@dataclass(frozen=True)
class Scenario:
    """`stage`: what an eighth of the layers takes. `groups_are_ranks`: as many groups as ranks, not the engine's."""

    name: str
    stage: Cost
    groups_are_ranks: bool = False

    @property
    def layer(self) -> Cost:
        share = REFERENCE_RANKS / NUM_LAYERS
        return Cost(self.stage.fixed_s * share, self.stage.per_row_s * share)

    def groups(self, ranks: int) -> int | None:
        return ranks if self.groups_are_ranks else None

    def ring(self, ranks: int, link: Link, overhead_s: float) -> Ring:
        stages = [Cost(n * self.layer.fixed_s, n * self.layer.per_row_s) for n in layer_split(ranks)]
        return Ring(stages, link, ROW_BYTES, overhead_s)


# 32 streams in the 11 groups that 8 ranks form make steps of 10 ms.
GROWING = Scenario("2 ms and 2.75 ms a row for an eighth of the layers", Cost(0.002, 0.00275))
CONSTANT = Scenario("10 ms for an eighth of the layers at any number of rows", Cost(0.010, 0.0))
IN_GROUPS = Scenario(CONSTANT.name + ", one group a rank", CONSTANT.stage, groups_are_ranks=True)
SCENARIOS = {"growing": GROWING, "constant": CONSTANT, "constant-in-groups": IN_GROUPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--scenarios", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--settle-seconds", type=float, default=10, help="until the engine has found its groups")
    parser.add_argument("--seconds", type=float, default=15, help="that are measured")
    parser.add_argument("--overhead-ms", type=float, default=0.5, help="of a frame and rank, for the larger rings")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.ranks, arguments.settle_seconds, arguments.seconds = [1, 4], 3.0, 4.0
        arguments.scenarios = ["growing"]
    end_in_order()
    print(heading(f"Simulated compute, {arguments.streams} streams"))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = models.write_layered(Path(scratch) / "model", NUM_LAYERS)
        for scenario in map(SCENARIOS.__getitem__, arguments.scenarios):
            usages = {
                ranks: measure(
                    model,
                    ranks,
                    scenario.layer,
                    streams=arguments.streams,
                    groups=scenario.groups(ranks),
                    settle_s=arguments.settle_seconds,
                    measured_s=arguments.seconds,
                )
                for ranks in arguments.ranks
            }
            print(f"\n**{scenario.name}**; shares of each compute thread's time, means over the ranks\n")
            print(usage_table(usages) + "\n", flush=True)
            print(check_table(scenario, usages, arguments.streams), flush=True)
    print(
        f"\n**Larger rings and longer links, from the model.** {ROWS_PER_RANK} streams a rank; the model grows with "
        "the ring, so that a stage takes 10 ms for 4 rows at every size; one machine has all of it and all streams.\n"
        f"Own time {arguments.overhead_ms} ms a frame and rank, {ROW_BYTES} bytes a row. Cells: tokens/s over one "
        "machine's, groups, and the share of the time that the stages compute.\n"
    )
    print(model_table(arguments.overhead_ms / 1000))


def usage_table(usages: dict[int, Usage]) -> str:
    rows = []
    single = next(iter(usages.values()))
    for ranks, usage in usages.items():
        least, most = min(usage.computing), max(usage.computing)
        parts = [usage.own, usage.bubble, usage.idle, usage.receiving, usage.sending]
        rows.append(
            [
                str(ranks),
                str(usage.num_groups),
                cell(usage.tokens_per_s, 1),
                cell(usage.tokens_per_s / single.tokens_per_s),
                f"{_percent(usage.computing)} ({least * 100:.0f} to {most * 100:.0f})",
                *map(_percent, parts),
                cell(usage.own_s_per_frame * 1000),
                cell(usage.hop_s_per_frame * 1000),
            ]
        )
    times = f"× P = {next(iter(usages))}"
    shares = ["computing", "own", "bubble", "idle", "receiving, beside", "sending, beside"]
    return table(["P", "groups", "tok/s", times, *shares, "own, ms a frame", "receiving, ms"], rows)


def check_table(scenario: Scenario, usages: dict[int, Usage], streams: int) -> str:
    """The model beside the measurement, with the groups and the own and transfer times of a frame that it had."""
    rows = []
    for ranks, usage in usages.items():
        ring = scenario.ring(ranks, Link(delay_s=usage.hop_s_per_frame), max(0.0, usage.own_s_per_frame))
        predicted = predict(ring, streams, max(1, usage.num_groups))
        rows.append(
            [
                str(ranks),
                cell(usage.tokens_per_s, 1),
                cell(predicted.tokens_per_s, 1),
                cell(usage.tokens_per_s / predicted.tokens_per_s),
                _percent(predicted.computing),
            ]
        )
    return table(["P", "tok/s measured", "model", "measured over model", "computing, model"], rows)


def model_table(overhead_s: float) -> str:
    links = [Link(delay_ms / 1000, gbit * 1e9) for gbit in LINKS_GBIT for delay_ms in DELAYS_MS]
    columns = ["no links", *(f"{gbit} Gbit/s, {delay_ms} ms" for gbit in LINKS_GBIT for delay_ms in DELAYS_MS)]
    rows = []
    for ranks in MODELLED_RANKS:
        streams = ROWS_PER_RANK * ranks
        whole = Cost(ranks * MODELLED_STAGE.fixed_s, ranks * MODELLED_STAGE.per_row_s)
        alone = predict(Ring([whole], Link(), ROW_BYTES, overhead_s), streams)
        rings = [Ring([MODELLED_STAGE] * ranks, link, ROW_BYTES, overhead_s) for link in [Link(), *links]]
        rows.append([str(ranks), *(_model_cell(predict(ring, streams), alone) for ring in rings)])
    return table(["P", *columns], rows)


def _model_cell(predicted: Prediction, alone: Prediction) -> str:
    return f"{predicted.tokens_per_s / alone.tokens_per_s:.1f}, {predicted.num_groups}, {_percent(predicted.computing)}"


def _percent(shares: list[float]) -> str:
    return f"{statistics.fmean(shares) * 100:.0f} %"


if __name__ == "__main__":
    main()
