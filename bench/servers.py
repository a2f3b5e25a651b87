"""Our server against mlx_lm.server, alone and pipelined: tokens per second, time to first token, gaps between tokens.

Every contestant is asked over HTTP by the same client, with the same prompts in every round, one contestant after the
other, so that a machine whose speed drifts treats them alike; ratios are taken round by round. Answers are greedy and
have a fixed length. Prefix caches are off, ours and mlx_lm's; prompts share nothing but the template's first tokens.

    python -m bench.servers --model packed --ranks 1 2 --streams 1 8
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from bench import models
from bench.client import Answer, Request, ask_all, steady_tokens_per_second, tokens_per_second
from bench.contestants import Contestant, end_in_order, mlx_lm_server, ours
from bench.environment import heading, table
from bench.figures import cell, median, median_ratio, milliseconds, percentile, value_range
from bench.prompts import Prompts
from bench.stages import Spent, spent_so_far, stages_table

Rounds = dict[str, list[list[Answer]]]  # contestant -> round -> answers
WITHOUT = ["mlx_lm", "pipeline"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="packed")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="ring sizes of ours")
    parser.add_argument("--one-group", action="store_true", help="also ours, 2 ranks, with one group in lockstep")
    parser.add_argument("--without", choices=WITHOUT, nargs="+", default=[], help="leave these out")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.tokens, arguments.rounds = [1, 4], 8, 1
    end_in_order()
    with contextlib.ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder = models.prepare(arguments.model, scratch)
        prompts = Prompts(folder)
        contestants = start(arguments, folder, prompts.banned_token_ids(), scratch, cleanup)
        print(heading(f"Servers, {arguments.model} model, {arguments.tokens} tokens an answer"))
        print("mlx_lm's processes are stopped (SIGSTOP) outside their turns; all contestants use OpenBLAS.")
        for streams in arguments.streams:
            rounds, spent = run(contestants, prompts, streams, arguments.tokens, arguments.rounds)
            print(f"\n**{streams} streams at once**, {arguments.rounds} rounds\n")
            print(latency_table(rounds) + "\n\n" + ratio_table(rounds))
            if spent:
                print("\n" + stages_table(spent), flush=True)


def start(
    arguments: argparse.Namespace, folder: Path, banned: tuple[int, ...], scratch: Path, cleanup: contextlib.ExitStack
) -> list[Contestant]:
    """All that the arguments ask for, ready; `cleanup` ends them."""
    settings: list[tuple[str, int, int | None]] = [(f"ours, P = {ranks}", ranks, None) for ranks in arguments.ranks]
    if arguments.one_group:
        settings.append(("ours, P = 2, one group", 2, 1))
    contestants = [
        cleanup.enter_context(
            ours(name, folder, scratch, banned, ranks=ranks, PREFIX_CACHE=False, MICRO_BATCH_GROUPS=groups)
        )
        for name, ranks, groups in settings
    ]
    for pipeline, name in ((False, "mlx_lm"), (True, "pipeline")):
        if name not in arguments.without:
            contestants += cleanup.enter_context(mlx_lm_server(folder, scratch, banned, pipeline=pipeline))
    return contestants


def run(
    contestants: list[Contestant], prompts: Prompts, streams: int, tokens: int, num_rounds: int
) -> tuple[Rounds, dict[str, list[Spent]]]:
    """`num_rounds` that count after a short one that does not; who begins changes from round to round.

    With the answers comes what each rank of ours did in all the rounds that count.
    """
    rounds: Rounds = {contestant.name: [] for contestant in contestants}
    before: dict[str, list[Spent]] = {}
    ours = [contestant for contestant in contestants if contestant.is_ours]
    for turn in range(num_rounds + 1):
        if turn == 1:
            before = {contestant.name: spent_so_far(contestant.target) for contestant in ours}
        length = tokens if turn else min(tokens, 8)
        requests = [Request(prompts.short(f"{streams}, {turn}, {index}"), length) for index in range(streams)]
        first = turn % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            with contestant.turn():
                answers = ask_all(contestant.target, requests)
            short = [answer.num_tokens for answer in answers if answer.num_tokens != length]
            assert not short, f"{contestant.name} gave answers of {short} instead of {length} tokens"
            if turn:
                rounds[contestant.name].append(answers)
    spent = {
        contestant.name: [after.since(b) for after, b in zip(spent_so_far(contestant.target), before[contestant.name])]
        for contestant in ours
    }
    return rounds, spent


def latency_table(rounds: Rounds) -> str:
    """What each contestant did, over all rounds; times in ms."""
    names = list(rounds)
    columns = ["", "tok/s", "range", "tok/s while all run", "first token p50", "p99", "gap p50", "p99", "same text"]
    rows = []
    for name, answered in rounds.items():
        answers = [answer for answers in answered for answer in answers]
        reference = [answer for answers in rounds[names[0]] for answer in answers]
        ttfts = [answer.ttft for answer in answers]
        gaps = [gap for answer in answers for gap in answer.gaps]
        rates = [tokens_per_second(answers) for answers in answered]
        same = sum(a.text == b.text for a, b in zip(answers, reference, strict=True))
        rows.append(
            [
                name,
                cell(median(rates), 1),
                value_range(rates),
                cell(median([steady_tokens_per_second(answers) for answers in answered]), 1),
                *(milliseconds(percentile(ttfts, percent)) for percent in (50, 99)),
                *(milliseconds(percentile(gaps, percent)) for percent in (50, 99)),
                f"{same} of {len(answers)}",
            ]
        )
    return table(columns, rows)


def ratio_table(rounds: Rounds) -> str:
    """Tokens per second of the row over the column's: of whole rounds, and in brackets while all streams run."""
    whole = {name: [tokens_per_second(answers) for answers in answered] for name, answered in rounds.items()}
    steady = {name: [steady_tokens_per_second(answers) for answers in answered] for name, answered in rounds.items()}

    def ratio(name: str, other: str) -> str:
        if name == other:
            return ""
        return f"{cell(median_ratio(whole[name], whole[other]))} ({cell(median_ratio(steady[name], steady[other]))})"

    return table(["tok/s over", *rounds], [[name, *(ratio(name, other) for other in rounds)] for name in rounds])


if __name__ == "__main__":
    main()
