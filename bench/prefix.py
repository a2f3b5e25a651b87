"""The prefix cache: the second turn of a long chat, and users who share a system prompt, with the cache on and off.

Both servers stay loaded and get the same requests in turn. `cached` is what the server itself says, in
`usage.prompt_tokens_details.cached_tokens`; every round's prompts are new.

    python -m bench.prefix --model float32 --ranks 2
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from bench import models
from bench.client import Answer, Messages, Request, ask_all
from bench.contestants import Contestant, end_in_order, ours
from bench.environment import heading, table
from bench.figures import cell, median, median_ratio, milliseconds, percentile
from bench.prompts import Prompts

FOLLOW_UP = "Now tell me what you left out."
FOLLOW_UP_TOKENS = 8  # of the first answer; with the second question and the template at most 64
Turns = list[tuple[Answer, Answer]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="float32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shared-tokens", type=int, default=1500, help="of a chat's first turn")
    parser.add_argument("--system-tokens", type=int, default=500, help="of the system prompt that users share")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shared_tokens, arguments.system_tokens, arguments.users, arguments.rounds = 400, 100, 3, 1
    end_in_order()
    with contextlib.ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder = models.prepare(arguments.model, scratch)
        prompts = Prompts(folder)
        banned = prompts.banned_token_ids()
        contestants = [
            cleanup.enter_context(ours(name, folder, scratch, banned, ranks=arguments.ranks, PREFIX_CACHE=is_on))
            for name, is_on in (("cache on", True), ("cache off", False))
        ]
        for contestant in contestants:
            ask_all(contestant.target, [Request(prompts.of_length(300, "warm"), max_tokens=2)])
        print(heading(f"Prefix cache, {arguments.model} model, P = {arguments.ranks}"))
        print(f"{arguments.rounds} rounds; times in ms\n")
        print(second_turns(contestants, prompts, arguments.shared_tokens, arguments.rounds) + "\n", flush=True)
        print(shared_system_prompt(contestants, prompts, arguments))


def second_turns(contestants: list[Contestant], prompts: Prompts, shared_tokens: int, num_rounds: int) -> str:
    """A chat of two turns: the second brings the whole first one along."""
    turns: dict[str, Turns] = {contestant.name: [] for contestant in contestants}
    for turn in range(num_rounds):
        first = prompts.of_length(shared_tokens, f"chat {turn}")
        for contestant in contestants[:: -1 if turn % 2 else 1]:
            (answer,) = ask_all(contestant.target, [Request(first, FOLLOW_UP_TOKENS)])
            said: Messages = [{"role": "assistant", "content": answer.text}, {"role": "user", "content": FOLLOW_UP}]
            (follow_up,) = ask_all(contestant.target, [Request([*first, *said], FOLLOW_UP_TOKENS)])
            turns[contestant.name].append((answer, follow_up))
    rows = []
    for name, pairs in turns.items():
        second = [follow_up.ttft for _, follow_up in pairs]
        ratio = median_ratio(second, [answer.ttft for answer, _ in pairs])
        for label, answers in (("first", [a for a, _ in pairs]), ("second", [b for _, b in pairs])):
            rows.append(
                [
                    name,
                    label,
                    cell(median([answer.num_prompt_tokens for answer in answers]), 0),
                    cell(median([answer.num_cached_tokens for answer in answers]), 0),
                    cell(median([answer.num_prompt_tokens - answer.num_cached_tokens for answer in answers]), 0),
                    milliseconds(median([answer.ttft for answer in answers])),
                    f"{cell(ratio * 100, 1)} %" if label == "second" else "",
                ]
            )
    return table(["", "turn", "prompt tokens", "cached", "new", "first token", "of the first turn's"], rows)


def shared_system_prompt(contestants: list[Contestant], prompts: Prompts, arguments: argparse.Namespace) -> str:
    """Users who come at once with the same system prompt, which the server has not seen before."""
    rounds: dict[str, list[list[Answer]]] = {contestant.name: [] for contestant in contestants}
    for turn in range(arguments.rounds):
        system = prompts.of_length(arguments.system_tokens, f"system {turn}")[1]["content"]
        requests = [
            Request([{"role": "system", "content": system}, unique_question(prompts, f"user {turn} {user}")], 8)
            for user in range(arguments.users)
        ]
        for contestant in contestants[:: -1 if turn % 2 else 1]:
            rounds[contestant.name].append(ask_all(contestant.target, requests))
    slowest = {name: [max(a.ttft for a in answers) for answers in answered] for name, answered in rounds.items()}
    rows = []
    for name, answered in rounds.items():
        ttfts = [answer.ttft for answers in answered for answer in answers]
        rows.append(
            [
                name,
                cell(median([sum(a.num_prompt_tokens for a in answers) for answers in answered]), 0),
                cell(median([sum(a.num_cached_tokens for a in answers) for answers in answered]), 0),
                milliseconds(percentile(ttfts, 50)),
                milliseconds(median(slowest[name])),
                cell(median_ratio(slowest[name], slowest["cache off"])),
            ]
        )
    title = f"{arguments.users} users at once, one system prompt of {arguments.system_tokens} tokens"
    return table([title, "prompt tokens", "cached", "first token p50", "of the last user", "over cache off"], rows)


def unique_question(prompts: Prompts, label: str) -> dict[str, str]:
    return {"role": "user", "content": prompts.short(label)[0]["content"]}


if __name__ == "__main__":
    main()
