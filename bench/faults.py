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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.api_deaths import api_deaths
from bench.contestants import end_in_order
from bench.environment import heading, table
from bench.fault_links import links
from bench.figures import NONE, cell, median
from distributed.builtin_model import FLOAT32
from distributed.model_files import prepare_model
from tests.faults.kinds import KILL, LAUNCHER, STOP, Fault, Server, killed_twice, signalled, wedged
from tests.faults.rounds import Round, run_round
from tests.faults.streams import Bodies, Stream, read_all, requests
from tests.faulty_ranks import FaultyRank
from tests.multihost.namespaces import why_not
from tests.running_server import PROJECT, RunningServer
from tests.tiny_chat_model import write_tiny_chat_model

MODEL = "model"
RANKS = 3
VICTIMS = [*(f"rank {rank}" for rank in range(RANKS)), LAUNCHER]
KINDS = ["signals", "links", "wedges", "api"]
TINY_SHARE = 0.7  # of the rounds with signals
FEW_ROUNDS = 4  # of each other kind; of wedges in each rank, of dead api processes in each case
STEP_TIMEOUT_S = 5  # of the server whose ranks get stuck
AIMS_S = {"SIGKILL": 2.0, "SIGSTOP": 7.0, "link cut": 7.0, "wedge": STEP_TIMEOUT_S}  # beyond the start of a ring
SETTINGS = {"MODEL_NAME": MODEL, "SHUTDOWN_GRACE_S": 1, "PREFILL_CHUNK_TOKENS": 64}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--rounds", type=int, default=100, help="with signals")
    parser.add_argument("--model", choices=["both", "tiny", "float32"], default="both", help="for signals")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: order, moments, second victims")
    parser.add_argument("--quick", action="store_true", help="two minutes, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.model, arguments.kinds = 5, "tiny", ["signals"]
    num_tiny = {"both": round(TINY_SHARE * arguments.rounds), "tiny": arguments.rounds, "float32": 0}[arguments.model]
    end_in_order()
    print(heading(f"Faults, {RANKS} ranks, 8 streams") + "\nTimes in s.", flush=True)
    rng = random.Random(arguments.seed)
    is_sound = True
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scratch = Path(folder)
        tiny = write_tiny_chat_model(scratch / "tiny")
        if "signals" in arguments.kinds and num_tiny:
            is_sound &= show("tiny model", with_signals(tiny, 100, num_tiny, scratch / "tiny-ring", rng))
        if "signals" in arguments.kinds and (num_others := arguments.rounds - num_tiny):
            model = prepare_model(FLOAT32, PROJECT)
            is_sound &= show("float32 model", with_signals(model, 50, num_others, scratch / "float32-ring", rng))
        if "links" in arguments.kinds:
            if reason := why_not():
                print(f"\nNo links were cut: it {reason}.")
            else:
                is_sound &= show("tiny model, three hosts", with_links(tiny, FEW_ROUNDS, scratch, rng))
        if "wedges" in arguments.kinds:
            is_sound &= show("tiny model, a rank gets stuck", with_wedges(tiny, FEW_ROUNDS, scratch, rng))
        if "api" in arguments.kinds:
            text, ended = api_deaths(new_server(tiny, scratch / "deaths"), FEW_ROUNDS)
            print(f"\n**tiny model, the api process is killed**\n\n{text}", flush=True)
            is_sound &= ended
    return 0 if is_sound else 1


# -- rounds ----------------------------------------------------------------------------------------------------------


def deck(num_rounds: int, rng: random.Random) -> Iterator[Fault]:
    """All kinds about equally often, in an order that is drawn."""
    while num_rounds > 0:
        faults = [signalled(blow, victim) for blow in (KILL, STOP) for victim in VICTIMS]
        faults += [killed_twice(victim) for victim in rng.sample(VICTIMS, 2)]
        rng.shuffle(faults)
        yield from faults[:num_rounds]
        num_rounds -= len(faults)


def new_server(model: Path, root: Path, **keys: str) -> RunningServer:
    settings = {**SETTINGS, "MODEL_REPO": model, "RING_SIZE": RANKS, "KV_CACHE_RESERVED_MEMORY_MB": 256}
    return RunningServer(root, {key: str(value) for key, value in settings.items()} | keys)


@contextlib.contextmanager
def running(server: RunningServer) -> Iterator[RunningServer]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


def with_signals(model: Path, tokens: int, num_rounds: int, root: Path, rng: random.Random) -> list[Round]:
    with running(new_server(model, root)) as server:
        return run(server, requests(MODEL, tokens=tokens), deck(num_rounds, rng), rng)


def with_links(model: Path, num_rounds: int, scratch: Path, rng: random.Random) -> list[Round]:
    with links(scratch, model, **SETTINGS) as linked:
        faults = (linked.faults[number % len(linked.faults)] for number in range(num_rounds))
        return run(linked.server, requests(MODEL), faults, rng)


def with_wedges(model: Path, num_rounds: int, scratch: Path, rng: random.Random) -> list[Round]:
    """In each rank in turn; a rank is given its fault when it starts, so each has a server of its own."""
    rounds: list[Round] = []
    for rank in range(RANKS):
        faulty = FaultyRank("wedge", rank, scratch / f"rank {rank} is stuck")
        keys = faulty.environment | {"STEP_TIMEOUT": str(STEP_TIMEOUT_S)}
        faults = [wedged(faulty, f"rank {rank}")] * num_rounds
        with running(new_server(model, scratch / f"stuck-{rank}", **keys)) as server:
            rounds += run(server, requests(MODEL), faults, rng)
    return rounds


def run(server: Server, bodies: Bodies, faults: Iterable[Fault], rng: random.Random) -> list[Round]:
    undisturbed = calm(server, bodies)
    rounds: list[Round] = []
    for number, fault in enumerate(faults, 1):
        rounds.append(asyncio.run(run_round(server, bodies, undisturbed, fault, rng)))
        note(number, rounds[-1], server)
    return rounds


def calm(server: Server, bodies: Bodies) -> Sequence[Stream]:
    """The streams without a fault, twice: what differs by itself shows nothing."""
    first, second = (asyncio.run(read_all(server.url, bodies)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        if different := one.said.difference(other.said):
            raise RuntimeError(f"{one.name} differs without a fault: {different}")
    return first


# -- what is said of them --------------------------------------------------------------------------------------------


def note(number: int, done: Round, server: Server) -> None:
    """A line to stderr; where streams differ, all about it."""
    print(
        f"{number}: {done.fault}, {done.victim}, at {done.moment}: "
        f"{done.num_streams - len(done.differences)} of {done.num_streams} equal, "
        f"longest pause {max(done.pauses, default=0):.1f} s, start-up {done.start_up_s or 0:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    if not done.is_sound:
        print("\n".join([*done.differences, *(f"left over: {process}" for process in done.left_over)]), file=sys.stderr)
        kept = Path(tempfile.mkdtemp(prefix="faults-log-"))
        for log in [*server.root.glob("server.log*"), *server.root.glob("output.txt")]:
            shutil.copy(log, kept)
        print(f"the server's log is in {kept}", file=sys.stderr, flush=True)


def show(title: str, rounds: Sequence[Round]) -> bool:
    """Prints the table; whether all is well."""
    columns = ["fault", "victim", "rounds", "streams equal", "start-up", "pause p50", "worst"]
    columns += ["pause − start-up p50", "worst", "aim", "of it ready to next piece p50", "worst"]
    kinds = sorted({(each.fault, each.victim) for each in rounds})
    rows = [row(kind, victim, [r for r in rounds if (r.fault, r.victim) == (kind, victim)]) for kind, victim in kinds]
    print(f"\n**{title}**, {len(rounds)} rounds\n\n{table(columns, rows)}", flush=True)
    return all(each.is_sound for each in rounds)


def row(fault: str, victim: str, rounds: Sequence[Round]) -> list[str]:
    pauses = [pause for each in rounds for pause in each.pauses]
    starts = [each.start_up_s for each in rounds if each.start_up_s is not None]
    beyond = [pause - each.start_up_s for each in rounds if each.start_up_s is not None for pause in each.pauses]
    first_pieces = [seconds for each in rounds for seconds in each.first_pieces]
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
        f"{AIMS_S[fault]:.0f}" if beyond and fault in AIMS_S else NONE,
        cell(median(first_pieces), 1),
        cell(max(first_pieces, default=float("nan")), 1),
    ]


if __name__ == "__main__":
    sys.exit(main())
