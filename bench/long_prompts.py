"""Long prompts: the time to their first token on one rank and on several, and what they do to running streams.

On an idle ring a prompt of C equal chunks takes (C + P - 1) / (P · C) of what one rank takes; the first table shows how
much of that is reached. The second shows the gaps of running streams while a prompt is read beside them. All servers
stay loaded and are asked in turn, ratios are taken round by round. Every prompt is new, the prefix cache is off.

    python -m bench.long_prompts --model float32 --threads 1
    python -m bench.long_prompts --curve
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench import models
from bench.beside import Disturbance, alone, disturb
from bench.client import Request, Target, ask_all
from bench.contestants import Contestant, end_in_order, ours
from bench.environment import heading, table
from bench.figures import cell, median, median_ratio, milliseconds, percentile
from bench.prompts import Prompts

BUDGETS = [32, 64, 128, 256, 512]
SHOWN_FACTORS = [2.5, 5.0]
STREAM_TOKENS = 4000  # more than a stream gets before it is broken off
_REPORTS_S = 2.5  # the ranks report their counters once a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="float32")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, nargs="+", default=[500, 2000, 4000], help="their tokens")
    parser.add_argument("--chunk-tokens", type=int, nargs="*", default=[256], help="PREFILL_CHUNK_TOKENS; none: auto")
    parser.add_argument("--streams", type=int, default=4, help="that run meanwhile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="OPENBLAS_NUM_THREADS of every rank; 1 is a core a rank")
    parser.add_argument("--curve", action="store_true", help=f"the trade-off over the token budgets {BUDGETS}")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompts, arguments.rounds = [300], 1
    if arguments.threads:
        os.environ["OPENBLAS_NUM_THREADS"] = str(arguments.threads)  # all servers inherit it
    end_in_order()
    with contextlib.ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder = models.prepare(arguments.model, scratch)
        bench = _Bench(arguments, folder, scratch, cleanup)
        if arguments.curve:
            bench.curve()
        else:
            bench.tables()


class _Bench:
    """One run: its servers and prompts."""

    def __init__(
        self, arguments: argparse.Namespace, folder: Path, scratch: Path, cleanup: contextlib.ExitStack
    ) -> None:
        self._arguments = arguments
        self._folder, self._scratch, self._cleanup = folder, scratch, cleanup
        self._prompts = Prompts(folder)
        self._banned = self._prompts.banned_token_ids()
        threads = f", OPENBLAS_NUM_THREADS={arguments.threads}" if arguments.threads else ""
        self._title = f"{arguments.model} model{threads}"

    def tables(self) -> None:
        """TTFT on an idle ring at each number of ranks, then beside streams."""
        chunk_tokens = next(iter(self._arguments.chunk_tokens), None)
        servers = {ranks: self._server(f"P = {ranks}", ranks, chunk_tokens) for ranks in self._arguments.ranks}
        print(heading(f"Long prompts, {self._title}"))
        print(f"PREFILL_CHUNK_TOKENS={chunk_tokens or 'auto'}; {self._arguments.rounds} rounds; times in ms\n")
        rows = [row for num_tokens in self._arguments.prompts for row in self._on_idle_rings(servers, num_tokens)]
        columns = ["prompt", "P", "chunks C", "first token", "P = 1 over it", "P·C/(C+P−1)", "reached"]
        print(table(columns, rows) + "\n", flush=True)
        rows = [row for num_tokens in self._arguments.prompts for row in self._beside_streams(servers, num_tokens)]
        gaps = ["gap before p50", "p99", "max", "gap meanwhile p50", "p99", "max"]
        print(table(["prompt", f"P, {self._arguments.streams} streams beside", "first token", *gaps], rows), flush=True)

    def curve(self) -> None:
        """Token budgets against gap factor and the newcomer's wait, on the largest ring asked for."""
        ranks = max(self._arguments.ranks)
        servers = {budget: self._server(f"budget {budget}", ranks, budget) for budget in BUDGETS}
        num_tokens = self._arguments.prompts[len(self._arguments.prompts) // 2]
        disturbances: dict[int, list[Disturbance]] = {budget: [] for budget in BUDGETS}
        unloaded: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
        for turn in range(self._arguments.rounds):
            for budget, server in _in_turn(servers, turn):
                unloaded[budget].append(alone(server.target, self._newcomer(num_tokens, f"alone {turn} {budget}")))
                disturbances[budget].append(self._disturbed(server.target, num_tokens, f"{turn} {budget}"))
        print(heading(f"Token budget of a lap, {self._title}"))
        print(f"P = {ranks}; a newcomer of {num_tokens} tokens beside {self._arguments.streams} streams; times in ms\n")
        points = {budget: CurvePoint.of(disturbances[budget], unloaded[budget]) for budget in BUDGETS}
        of_it = [f"g/(g−1) of {kind} gaps, and what is waited of it" for kind in ("median", "mean")]
        columns = ["budget", "gap before", "gap meanwhile", "g, median", "g, mean"]
        columns += ["first token alone", "beside streams", "times longer", *of_it]
        rows = [[str(budget), *point.cells()] for budget, point in points.items()]
        print(table(columns, rows) + "\n")
        columns = [f"times longer, by {kind} gaps" for kind in ("median", "mean")]
        print(table(["g, between the points", "g/(g−1)", *columns], between(list(points.values()))))

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _on_idle_rings(self, servers: dict[int, Contestant], num_tokens: int) -> list[list[str]]:
        seconds: dict[int, list[float]] = {ranks: [] for ranks in servers}
        for turn in range(self._arguments.rounds):
            newcomer = self._newcomer(num_tokens, f"idle {num_tokens} {turn}")
            for ranks, server in _in_turn(servers, turn):
                seconds[ranks].append(alone(server.target, newcomer))
        rows = []
        for ranks, server in servers.items():
            chunks = self._chunks(server.target, num_tokens)
            bound = ranks * chunks / (chunks + ranks - 1)
            ratio = median_ratio(seconds[min(servers)], seconds[ranks])
            figures = [cell(ratio), cell(bound), cell(ratio / bound)] if ranks > min(servers) == 1 else [""] * 3
            rows.append([str(num_tokens), str(ranks), str(chunks), milliseconds(median(seconds[ranks])), *figures])
        return rows

    def _beside_streams(self, servers: dict[int, Contestant], num_tokens: int) -> list[list[str]]:
        measured: dict[int, list[Disturbance]] = {ranks: [] for ranks in servers}
        for turn in range(self._arguments.rounds):
            for ranks, server in _in_turn(servers, turn):
                measured[ranks].append(self._disturbed(server.target, num_tokens, f"{num_tokens} {turn}"))
        rows = []
        for ranks, disturbances in measured.items():
            before = [gap for disturbance in disturbances for gap in disturbance.before]
            during = [gap for disturbance in disturbances for gap in disturbance.during]
            ttft = median([disturbance.newcomer.ttft for disturbance in disturbances])
            gaps = [percentile(values, percent) for values in (before, during) for percent in (50, 99, 100)]
            rows.append([str(num_tokens), str(ranks), milliseconds(ttft), *map(milliseconds, gaps)])
        return rows

    def _disturbed(self, target: Target, num_tokens: int, label: str) -> Disturbance:
        streams = [
            Request(self._prompts.short(f"stream {label} {index}"), STREAM_TOKENS)
            for index in range(self._arguments.streams)
        ]
        return disturb(target, streams, self._newcomer(num_tokens, f"beside {label}"))

    def _newcomer(self, num_tokens: int, label: str) -> Request:
        return Request(self._prompts.of_length(num_tokens, label), max_tokens=1)

    def _chunks(self, target: Target, num_tokens: int) -> int:
        """How many a prompt of `num_tokens` is read in; its last token is the first decode step's."""
        if self._arguments.chunk_tokens:
            return math.ceil((num_tokens - 1) / self._arguments.chunk_tokens[0])
        long = self._frames_of(target, self._newcomer(num_tokens, f"counted {num_tokens}"))
        short = self._frames_of(target, Request(self._prompts.short(f"counted {num_tokens}"), max_tokens=1))
        return long - short + 1

    def _frames_of(self, target: Target, request: Request) -> int:
        """Frames that rank 0 ran for a request, by its own counters."""

        def total() -> int:
            time.sleep(_REPORTS_S)
            return httpx.get(f"{target.url}/health").json()["ranks"][0]["counters"]["num_frames"]

        before = total()
        ask_all(target, [request])
        return total() - before

    def _server(self, name: str, ranks: int, chunk_tokens: int | None) -> Contestant:
        settings = {"PREFIX_CACHE": False, "PREFILL_CHUNK_TOKENS": chunk_tokens}
        server = self._cleanup.enter_context(
            ours(name, self._folder, self._scratch, self._banned, ranks=ranks, **settings)
        )
        alone(server.target, self._newcomer(300, "warm"))
        return server


def _in_turn(servers: dict[int, Contestant], turn: int) -> list[tuple[int, Contestant]]:
    """Forwards and backwards by turns, so that no server always comes first."""
    return list(servers.items())[:: -1 if turn % 2 else 1]


@dataclass(frozen=True)
class CurvePoint:
    """What one token budget does; medians over the rounds, seconds."""

    gap_before: float
    gap_during: float
    gap_factor: float
    mean_gap_factor: float
    unloaded: float
    loaded: float
    times_longer: float

    @classmethod
    def of(cls, disturbances: list[Disturbance], unloaded: list[float]) -> CurvePoint:
        loaded = [disturbance.newcomer.ttft for disturbance in disturbances]
        return cls(
            gap_before=median([percentile(disturbance.before, 50) for disturbance in disturbances]),
            gap_during=median([percentile(disturbance.during, 50) for disturbance in disturbances]),
            gap_factor=median([disturbance.gap_factor for disturbance in disturbances]),
            mean_gap_factor=median([disturbance.mean_gap_factor for disturbance in disturbances]),
            unloaded=median(unloaded),
            loaded=median(loaded),
            times_longer=median_ratio(loaded, unloaded),
        )

    def cells(self) -> list[str]:
        return [
            *map(milliseconds, (self.gap_before, self.gap_during)),
            *map(cell, (self.gap_factor, self.mean_gap_factor)),
            *map(milliseconds, (self.unloaded, self.loaded)),
            cell(self.times_longer),
            *(self._of_fair(factor) for factor in (self.gap_factor, self.mean_gap_factor)),
        ]

    def _of_fair(self, factor: float) -> str:
        """What a gap factor would have the newcomer wait, and how much of that it waits; the aim is 1.1 at most."""
        return f"{cell(fair_wait(factor))}: {cell(self.times_longer / fair_wait(factor))}"


def fair_wait(gap_factor: float) -> float:
    """A newcomer that gets (g - 1) / g of the time waits g / (g - 1) times as long as alone."""
    return gap_factor / (gap_factor - 1) if gap_factor > 1 else math.nan


def between(points: list[CurvePoint]) -> list[list[str]]:
    """The wait at the gap factors `SHOWN_FACTORS`, by the median gaps and by the mean ones."""
    by_median = [(point.gap_factor, point.times_longer) for point in points]
    by_mean = [(point.mean_gap_factor, point.times_longer) for point in points]
    rows = []
    for factor in SHOWN_FACTORS:
        longer = [interpolated(by, factor) for by in (by_median, by_mean)]
        of_fair = [f"{cell(times)} ({cell(times / fair_wait(factor))} of it)" for times in longer]
        rows.append([cell(factor, 1), cell(fair_wait(factor)), *of_fair])
    return rows


def interpolated(points: list[tuple[float, float]], x: float) -> float:
    """On straight lines between the points (x, y); NaN outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(sorted(points)):
        if x0 <= x <= x1:
            return y0 if x0 == x1 else y0 + (x - x0) / (x1 - x0) * (y1 - y0)
    return math.nan


if __name__ == "__main__":
    main()
