"""What a running server costs besides its work: memory of each rank, peak while loading, idle processor use, start
time.

python -m bench.footprint --ranks 1 2 3
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil

from bench.environment import heading, table
from distributed.model_files import inspect_model, prepare_model
from tests.running_server import PROJECT, RunningServer

MIB = 2**20
SETTLE_S = 5  # after ready, before idleness is measured


def measure(folder: Path, ranks: int, idle_s: float, scratch: Path) -> list[list[str]]:
    environ = {"MODEL_REPO": str(folder), "RING_SIZE": str(ranks), "KV_CACHE_RESERVED_MEMORY_MB": "512"}
    server = RunningServer(scratch / f"ring-{ranks}", environ)
    started = time.monotonic()
    server.start()
    start_s = time.monotonic() - started
    try:
        held = server.health()["ranks"]
        time.sleep(SETTLE_S)
        idle = idle_cores(server, idle_s)
    finally:
        server.stop()
    model_bytes = sum(file.total_bytes for file in inspect_model(folder).weight_files)
    return [
        [
            str(ranks),
            str(rank["rank"]),
            "[{}, {})".format(*rank["layers"]),
            f"{rank['memory_bytes'] / MIB:.0f}",
            f"{rank['memory_bytes'] / model_bytes:.2f}",
            f"{rank['peak_memory_bytes'] / rank['memory_bytes']:.2f}",
            f"{start_s:.1f}" if rank["rank"] == 0 else "",
            f"{idle * 100:.2f} %" if rank["rank"] == 0 else "",
        ]
        for rank in held
    ]


def idle_cores(server: RunningServer, seconds: float) -> float:
    """Cores that api, launcher and ranks together use while nobody asks anything."""
    assert server.process is not None
    api = psutil.Process(server.process.pid)
    processes = [api, *api.children(recursive=True)]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(seconds)
    after = [sum(process.cpu_times()[:2]) for process in processes]
    return (sum(after) - sum(before)) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--idle-seconds", type=float, default=30)
    arguments = parser.parse_args()
    folder = prepare_model(arguments.model, PROJECT)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            row for ranks in arguments.ranks for row in measure(folder, ranks, arguments.idle_seconds, Path(scratch))
        ]
    print(heading(f"Footprint of {folder.name}"))
    columns = ["P", "rank", "layers", "holds, MiB", "of the model", "peak / held", "start, s", "idle, one core"]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
