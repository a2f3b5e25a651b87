"""Tokens per second: this server over rings of several sizes against mlx_lm's BatchGenerator, side by side.

All contestants stay loaded; each round gives every one the same prompts in turn, so that a machine whose speed drifts
treats them alike, and the ratios are made round by round. Ours are measured over HTTP, as a client sees them; the
client and the api process share the machine's cores with the ranks. BatchGenerator has them to itself.

    python -m bench.throughput --ranks 1 2 --streams 1 8
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mlx_lm.tokenizer_utils import load as load_tokenizer
from openai import AsyncOpenAI

from bench.environment import heading, table
from distributed.model_files import prepare_model
from tests.running_server import PROJECT, RunningServer

QUESTIONS = [
    "Explain in detail how tides come about.",
    "Write a long story about a lighthouse keeper.",
    "Describe the history of the printing press.",
    "How does a bicycle stay upright? Explain step by step.",
    "Compare three ways to bake bread.",
    "Tell me about the planets, one after the other.",
    "What happens in a cell when it divides?",
    "Write a travel guide for a week in the mountains.",
]
Run = Callable[[int, int], float]  # (streams, tokens each) -> tokens per second


def ours(server: RunningServer, banned: list[int]) -> Run:
    """Chat requests over HTTP; the ids that end an answer are banned, so that every answer has its full length."""

    async def one(client: AsyncOpenAI, question: str, max_tokens: int) -> int:
        answer = await client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=max_tokens,
            temperature=0,
            logit_bias={str(token_id): -100 for token_id in banned},
        )
        return answer.usage.completion_tokens if answer.usage else 0

    async def all_at_once(streams: int, max_tokens: int) -> float:
        async with server.async_client() as client:
            started = time.perf_counter()
            counts = await asyncio.gather(
                *(one(client, QUESTIONS[index % len(QUESTIONS)], max_tokens) for index in range(streams))
            )
            return sum(counts) / (time.perf_counter() - started)

    return lambda streams, max_tokens: asyncio.run(all_at_once(streams, max_tokens))


def batch_generator(process: subprocess.Popen[str], prompts: list[list[int]]) -> Run:
    """mlx_lm's BatchGenerator on the unsplit model, greedy, without stop tokens."""

    def run(streams: int, max_tokens: int) -> float:
        assert process.stdin is not None and process.stdout is not None
        work = {"prompts": [prompts[index % len(prompts)] for index in range(streams)], "max_tokens": max_tokens}
        process.stdin.write(json.dumps(work) + "\n")
        process.stdin.flush()
        result = json.loads(process.stdout.readline())
        return result["tokens"] / result["seconds"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    folder = prepare_model(arguments.model, PROJECT)
    tokenizer = load_tokenizer(folder)
    prompts = [
        list(tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True))
        for question in QUESTIONS
    ]
    with contextlib.ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        contestants: dict[str, Run] = {}
        for ranks in arguments.ranks:
            environ = {"MODEL_REPO": str(folder), "RING_SIZE": str(ranks), "KV_CACHE_RESERVED_MEMORY_MB": "512"}
            server = RunningServer(scratch / f"ring-{ranks}", environ)
            server.start()
            cleanup.callback(server.stop)
            contestants[f"ours, P = {ranks}"] = ours(server, sorted(tokenizer.eos_token_ids))
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.batch_generator", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        cleanup.callback(process.wait)
        cleanup.callback(process.kill)
        assert process.stdout is not None
        process.stdout.readline()
        contestants["mlx_lm BatchGenerator"] = batch_generator(process, prompts)
        print(heading(f"Throughput of {folder.name}, {arguments.tokens} tokens an answer"))
        for streams in arguments.streams:
            print(compare(contestants, streams, arguments.tokens, arguments.rounds), flush=True)


def compare(contestants: dict[str, Run], streams: int, tokens: int, rounds: int) -> str:
    """One table: medians, and the medians of the ratios to each other contestant, taken round by round."""
    names = list(contestants)
    for run in contestants.values():  # a round that does not count
        run(streams, 8)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rates[name].append(contestants[name](streams, tokens))
    rows = []
    for name in names:
        ratios = [
            ""
            if other == name
            else f"{statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True)):.2f}"
            for other in names
        ]
        rows.append(
            [
                name,
                f"{statistics.median(rates[name]):.1f}",
                f"{min(rates[name]):.1f} to {max(rates[name]):.1f}",
                *ratios,
            ]
        )
    return f"\n{streams} streams at once, {rounds} rounds\n\n" + table(
        ["", "tok/s, median", "range", *(f"× {name}" for name in names)], rows
    )


if __name__ == "__main__":
    main()
