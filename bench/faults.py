"""Faults under load: processes are killed and stopped while eight streams run over three ranks; no stream may differ.

Every round runs the same requests (two greedy, two sampled, two with a JSON schema, two with tools) and breaks the ring
at a piece that is drawn; `tests/faults` holds how. Each stream is compared with an undisturbed run: text, tool calls,
scored tokens, finish reason, usage. Exit code 1 where one differs, or where a process of a lost ring is left.

    python -m bench.faults                    100 rounds: 70 with a tiny model, 30 with the embedded one in float32
    python -m bench.faults --quick
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.contestants import end_in_order
from bench.environment import heading, table
from bench.figures import cell, median
from distributed.builtin_model import FLOAT32
from distributed.model_files import prepare_model
from tests.faults.kinds import KILL, LAUNCHER, STOP, Fault, killed_twice, signalled
from tests.faults.rounds import Round, run_round
from tests.faults.streams import Bodies, Stream, read_all, requests
from tests.running_server import PROJECT, RunningServer
from tests.tiny_chat_model import write_tiny_chat_model

RANKS = 3
VICTIMS = [*(f"rank {rank}" for rank in range(RANKS)), LAUNCHER]
TINY_SHARE = 0.7  # of the rounds
AIMS_S = {"SIGKILL": 2.0, "SIGSTOP": 7.0}  # beyond the start of a ring
SETTINGS = {"MODEL_NAME": "model", "RING_SIZE": RANKS, "SHUTDOWN_GRACE_S": 1, "PREFILL_CHUNK_TOKENS": 64}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--model", choices=["both", "tiny", "float32"], default="both")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: order, moments, second victims")
    parser.add_argument("--quick", action="store_true", help="a minute or two, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.model = 5, "tiny"
    num_tiny = {"both": round(TINY_SHARE * arguments.rounds), "tiny": arguments.rounds, "float32": 0}[arguments.model]
    end_in_order()
    print(heading(f"Faults, {RANKS} ranks, 8 streams"), flush=True)
    rng = random.Random(arguments.seed)
    is_sound = True
    for name, num_rounds in (("tiny", num_tiny), ("float32", arguments.rounds - num_tiny)):
        if num_rounds:
            rounds = run(name, num_rounds, rng)
            print(f"\n**{name} model**, {num_rounds} rounds; times in s\n\n{report(rounds)}", flush=True)
            is_sound &= all(each.is_sound for each in rounds)
    return 0 if is_sound else 1


def deck(num_rounds: int, rng: random.Random) -> Iterator[Fault]:
    """All kinds about equally often, in an order that is drawn."""
    while num_rounds > 0:
        faults = [signalled(blow, victim) for blow in (KILL, STOP) for victim in VICTIMS]
        faults += [killed_twice(victim) for victim in rng.sample(VICTIMS, 2)]
        rng.shuffle(faults)
        yield from faults[:num_rounds]
        num_rounds -= len(faults)


def run(name: str, num_rounds: int, rng: random.Random) -> list[Round]:
    with contextlib.ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        tiny = name == "tiny"
        folder = write_tiny_chat_model(scratch / "tiny") if tiny else prepare_model(FLOAT32, PROJECT)
        keys = {**SETTINGS, "MODEL_REPO": folder, "KV_CACHE_RESERVED_MEMORY_MB": 64 if tiny else 256}
        server = RunningServer(scratch / "server", {key: str(value) for key, value in keys.items()})
        server.start()
        cleanup.callback(server.stop)
        bodies = requests(server.model, tokens=100 if tiny else 50)
        undisturbed = calm(server, bodies)
        rounds: list[Round] = []
        for number, fault in enumerate(deck(num_rounds, rng), 1):
            rounds.append(asyncio.run(run_round(server, bodies, undisturbed, fault, rng)))
            note(name, number, rounds[-1], server)
        return rounds


def calm(server: RunningServer, bodies: Bodies) -> Sequence[Stream]:
    """The streams without a fault, twice: what differs by itself shows nothing."""
    first, second = (asyncio.run(read_all(server.url, bodies)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        if different := one.said.difference(other.said):
            raise RuntimeError(f"{one.name} differs without a fault: {different}")
    return first


def note(name: str, number: int, done: Round, server: RunningServer) -> None:
    """A line to stderr; where streams differ, all about it."""
    print(
        f"{name} {number}: {done.fault} of {done.victim} at {done.moment}: "
        f"{done.num_streams - len(done.differences)} of {done.num_streams} equal, "
        f"longest pause {max(done.pauses, default=0):.1f} s, start-up {done.start_up_s or 0:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    if not done.is_sound:
        print("\n".join([*done.differences, *(f"left over: {process}" for process in done.left_over)]), file=sys.stderr)
        kept = Path(tempfile.mkdtemp(prefix="faults-log-"))
        for log in [*server.root.glob("server.log*"), server.root / "output.txt"]:
            shutil.copy(log, kept)
        print(f"the server's log is in {kept}", file=sys.stderr, flush=True)


def report(rounds: Sequence[Round]) -> str:
    columns = ["fault", "victim", "rounds", "streams equal", "start-up", "pause p50", "worst"]
    columns += ["pause − start-up p50", "worst", "aim"]
    kinds = dict.fromkeys((each.fault, each.victim) for each in rounds)
    rows = [row(kind, victim, [r for r in rounds if (r.fault, r.victim) == (kind, victim)]) for kind, victim in kinds]
    return table(columns, sorted(rows))


def row(fault: str, victim: str, rounds: Sequence[Round]) -> list[str]:
    pauses = [pause for each in rounds for pause in each.pauses]
    starts = [each.start_up_s for each in rounds if each.start_up_s is not None]
    beyond = [pause - each.start_up_s for each in rounds if each.start_up_s is not None for pause in each.pauses]
    num_streams = sum(each.num_streams for each in rounds)
    num_equal = num_streams - sum(len(each.differences) for each in rounds)
    return [
        fault,
        victim,
        str(len(rounds)),
        f"{num_equal} of {num_streams}",
        cell(median(starts), 1),
        cell(median(pauses), 1),
        cell(max(pauses, default=float("nan")), 1),
        cell(median(beyond), 1),
        cell(max(beyond, default=float("nan")), 1),
        cell(AIMS_S.get(fault, float("nan")) if beyond else float("nan"), 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
