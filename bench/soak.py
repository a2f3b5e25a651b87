"""A long mixed load with clients that leave: afterwards memory, slots, KV cache and open files must be as before.

The time has five parts. The first warms the server up: caches fill, allocators find their size. Then it is left alone
until nothing runs, which gives the idle values, and is loaded again to the end. Resident memory is compared under load,
by the medians of the second and the fifth part. Exit code 1 where something has grown, or a request failed.

    python -m bench.soak --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.contestants import end_in_order
from bench.environment import heading, table
from bench.figures import median
from bench.held import Idle, idle, metric, processes
from bench.mixed_load import KINDS, MixedLoad
from tests.running_server import RunningServer
from tests.tiny_chat_model import write_tiny_chat_model

RANKS = 2
CLIENTS = 12
SETTINGS = {
    "MODEL_NAME": "model",
    "RING_SIZE": RANKS,
    "KV_CACHE_MAX_SIZE": 6000,  # for 12 clients, some of whom name no limit: somebody must step back now and then
    "MAX_SEQUENCE_LENGTH": 1500,
    "SHUTDOWN_GRACE_S": 1,
}
PARTS = 5
WARM, LAST = 1, 4  # of the parts, those that are compared
MOST_RESIDENT = 1.01  # of what it was after the warm-up
SAMPLE_S = 0.5
MIB = 2**20


@dataclass
class Soak:
    """What was seen. `resident`: bytes of each process, medians of each part of the time."""

    load: MixedLoad
    warm: Idle | None = None
    end: Idle | None = None
    resident: list[dict[str, float]] = field(default_factory=list)
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    answers_still: bool = False

    def problems(self, most_resident: float = MOST_RESIDENT) -> list[str]:
        """What must not be, a line each."""
        assert self.warm is not None and self.end is not None
        found = [*self.load.errors[:10], *_grown(self.warm, self.end)]
        for name, size in self.resident[WARM].items():
            if self.resident[LAST][name] > size * most_resident:
                found.append(f"resident memory of {name}: {size} B became {self.resident[LAST][name]} B")
        if not self.answers_still:
            found.append("the next request was not answered")
        return found


def _grown(before: Idle, after: Idle) -> list[str]:
    held: list[tuple[str, Mapping[str, int], Mapping[str, int]]] = [
        ("MLX's memory", before.memory_bytes, after.memory_bytes),
        ("open files", before.num_fds, after.num_fds),
    ]
    return [
        *([] if after.is_quiet else [f"something is still held: {after}"]),
        *(
            f"{what} of {name}: {count} became {later[name]}"
            for what, earlier, later in held
            for name, count in earlier.items()
            if later[name] > count
        ),
    ]


def soak(server: RunningServer, seconds: float, seed: int = 0) -> Soak:
    """Load the server, which must be ready, for so long."""
    load = MixedLoad(server.url, server.model, random.Random(seed))
    seen = Soak(load)
    seen.resident.append(_loaded(server, load, seconds / PARTS))
    seen.warm = idle(server)
    seen.resident += [_loaded(server, load, seconds / PARTS) for _ in range(PARTS - 1)]
    seen.end = idle(server)
    seen.num_preemptions = int(metric(server, "num_preemptions_total"))
    seen.num_cached_tokens = int(metric(server, "prompt_tokens_cached_total"))
    body = {"model": server.model, "messages": [{"role": "user", "content": "And now?"}], "max_tokens": 3}
    seen.answers_still = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    return seen


def _loaded(server: RunningServer, load: MixedLoad, seconds: float) -> dict[str, float]:
    """Run the load; the median resident memory of each process."""
    watched = processes(server)
    samples: dict[str, list[float]] = {name: [] for name in watched}

    async def sample() -> None:
        running = asyncio.create_task(load.run(CLIENTS, seconds))
        while not running.done():
            for name, process in watched.items():
                samples[name].append(process.memory_info().rss)
            await asyncio.wait([running], timeout=SAMPLE_S)
        await running

    asyncio.run(sample())
    return {name: median(sizes) for name, sizes in samples.items()}


# -- as tables -------------------------------------------------------------------------------------------------------


def load_table(seen: Soak) -> str:
    counts = (("answered", seen.load.answered), ("left early", seen.load.left))
    rows = [[name, *(str(count[kind]) for kind in KINDS), str(count.total())] for name, count in counts]
    return table(["", *KINDS, "all"], rows)


def resident_table(seen: Soak) -> str:
    rows = [
        [
            name,
            *(f"{part[name] / MIB:.1f}" for part in seen.resident),
            f"{(seen.resident[LAST][name] / seen.resident[WARM][name] - 1) * 100:+.2f} %",
        ]
        for name in seen.resident[0]
    ]
    return table(["resident, MiB", "warm-up", *(f"part {part}" for part in range(2, PARTS + 1)), "part 5 over 2"], rows)


def idle_table(seen: Soak) -> str:
    assert seen.warm is not None and seen.end is not None
    warm, end = seen.warm, seen.end
    rows = [
        ["requests", str(warm.requests), str(end.requests)],
        ["KV tokens of requests", str(warm.kv_tokens), str(end.kv_tokens)],
        ["connections of clients", str(warm.num_connections), str(end.num_connections)],
        ["entries of the prefix cache", str(warm.num_prefixes), str(end.num_prefixes)],
        *(
            [f"{what}, {name}", f"{earlier[name]:,}", f"{later[name]:,}"]
            for what, earlier, later in (
                ("KV bytes less prefixes", warm.kv_bytes, end.kv_bytes),
                ("MLX's active bytes less prefixes", warm.memory_bytes, end.memory_bytes),
                ("open files", warm.num_fds, end.num_fds),
            )
            for name in earlier
        ),
    ]
    return table(["idle", "after the warm-up", "at the end"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes = 1
    end_in_order()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        environ = {**SETTINGS, "MODEL_REPO": write_tiny_chat_model(Path(scratch) / "tiny")}
        server = RunningServer(Path(scratch) / "server", {key: str(value) for key, value in environ.items()})
        server.start()
        try:
            seen = soak(server, arguments.minutes * 60, arguments.seed)
        finally:
            server.stop()
    print(heading(f"Soak, {arguments.minutes:g} minutes, {RANKS} ranks, {CLIENTS} clients at a time"))
    print(f"{load_table(seen)}\n\n{resident_table(seen)}\n\n{idle_table(seen)}\n")
    print(f"{seen.num_preemptions} preemptions; {seen.num_cached_tokens} tokens of prompts from the prefix cache.")
    problems = seen.problems()
    if not (seen.num_preemptions and seen.num_cached_tokens):
        problems.append("The load was too light: nobody stepped back, or no prompt was known.")
    print("\n".join(problems) or "Nothing has grown, and the next request was answered.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
