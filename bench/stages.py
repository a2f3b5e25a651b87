"""Where the ranks of ours spent the turns of a benchmark: the counters that each keeps in production, before and after.

It explains a ratio: what is missing to P times one rank is either steps that take longer than on one rank (ranks that
share a machine's cores or memory) or ranks that wait (uneven stages, bubbles). Read over /health; used by
`bench.servers`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx

from bench.client import Target
from bench.environment import table
from bench.figures import cell

_NEWS_S = 3.0  # until every rank's last counters have come round the ring with the heartbeats


@dataclass(frozen=True)
class Spent:
    """What one rank did, in seconds of its compute thread, and the tokens it did it for."""

    layers: tuple[int, int]
    busy_s: float
    bubble_s: float
    num_tokens: int

    def since(self, before: Spent) -> Spent:
        return Spent(
            self.layers,
            self.busy_s - before.busy_s,
            self.bubble_s - before.bubble_s,
            self.num_tokens - before.num_tokens,
        )


def spent_so_far(target: Target) -> list[Spent]:
    """Each rank's totals, of an idle server."""
    time.sleep(_NEWS_S)
    ranks = httpx.get(f"{target.url}/health", timeout=10).json()["ranks"]
    return [
        Spent(tuple(rank["layers"]), *(rank["counters"][name] for name in ("busy_s", "bubble_s", "num_tokens")))
        for rank in ranks
    ]


def stages_table(spent: dict[str, list[Spent]]) -> str:
    """`spent`: contestant -> what each rank did in all turns; computing is compared with the first contestant's."""
    rows = []
    first = next(iter(spent.values()))
    for name, ranks in spent.items():
        total = _ms_a_token(ranks)
        for rank, each in enumerate(ranks):
            start, end = each.layers
            working = each.busy_s / (each.busy_s + each.bubble_s)
            rows.append(
                [
                    name if not rank else "",
                    str(rank),
                    f"[{start}, {end})",
                    f"{working:.0%}",
                    cell(_ms_a_token([each]), 1),
                    cell(total / _ms_a_token(first)) if not rank else "",
                ]
            )
    columns = ["", "rank", "layers", "computing while there was work", "ms a token", "all ranks over the first line's"]
    return table(columns, rows)


def _ms_a_token(ranks: list[Spent]) -> float:
    """Of a token's way through `ranks`."""
    return 1000 * sum(rank.busy_s / max(1, rank.num_tokens) for rank in ranks)
