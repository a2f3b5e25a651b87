"""How much processes that compute at the same time slow each other down on this machine, with no ring between them.

Ranks that share a machine share its memory, its caches and sometimes its cores (two of a virtual machine may be one of
the real one), so what P of them can give is bounded by P over this slowdown; ranks on machines of their own are not.
Each process (`bench.step_process`) runs the same decode steps of the whole model; first one alone, then several.

    python -m bench.cores --model packed
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import models
from bench.environment import heading, table
from bench.figures import cell, median
from tests.running_server import PROJECT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="packed")
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.rounds = 2.0, 1
    counts = [1, *arguments.processes]
    taken: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = models.prepare(arguments.model, Path(scratch))
        for _ in range(arguments.rounds):
            for count in counts:
                taken[count].append(step_seconds(folder, count, arguments.rows, arguments.seconds))
    print(heading(f"Processes beside each other, {arguments.model} model, steps of {arguments.rows} rows"))
    rows = []
    for count in counts:
        slowdown = median([together / alone for together, alone in zip(taken[count], taken[1], strict=True)])
        rows.append([str(count), cell(1000 * median(taken[count]), 1), cell(slowdown), cell(count / slowdown)])
    print(table(["processes", "ms a step", "over one's", "together at most × one"], rows))


def step_seconds(folder: Path, num_processes: int, num_rows: int, seconds: float) -> float:
    """The median step of `num_processes` that run side by side, a core each."""
    command = [sys.executable, "-m", "bench.step_process", str(folder), str(num_rows), str(seconds)]
    environ = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with contextlib.ExitStack() as running:
        processes = [
            running.enter_context(
                subprocess.Popen(
                    command, cwd=PROJECT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(num_processes)
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n", "a process did not start"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return median([float(process.communicate()[0]) for process in processes])


if __name__ == "__main__":
    main()
