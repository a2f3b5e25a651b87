"""Prints docs/models.md's table: `python -m tests.distributed.parity_table`. It takes some minutes."""

from __future__ import annotations

from importlib.metadata import version

from distributed.errors import ModelError
from tests.distributed.cut_runs import parity
from tests.distributed.tiny_models import NO_TINY_MODEL, TINY, runnable


def row(architecture: str) -> str:
    """One line of the table."""
    if architecture not in runnable():
        return f"| {architecture} | not run: {NO_TINY_MODEL.get(architecture, 'needs Metal')} | | | |"
    try:
        result = parity(architecture)
    except ModelError:
        return f"| {architecture} | refused: one rank only | | | |"
    cells = [*map(_cell, result.differences.values()), _cell(result.batched)]
    return f"| {architecture} | {' | '.join(cells)} |"


def _cell(difference: float | None) -> str:
    return "no" if difference is None else "equal" if difference == 0 else f"{difference:.0e}"


if __name__ == "__main__":
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}\n")
    print("| architecture | P = 2 | P = 3 | one layer a stage | batches |\n|---|---|---|---|---|")
    for name in sorted(TINY.keys() | NO_TINY_MODEL.keys(), key=str.lower):
        print(row(name), flush=True)
