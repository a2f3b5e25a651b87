"""What grammar masks cost: decode throughput with a JSON schema of its own on each stream, and with none.

One server answers both, in turn, with the same prompts and answers of the same length; only the time in which all
streams run counts. The tokens drawn differ, as a schema leaves no choice: that is what it is for.

    python -m bench.masks --model packed
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

from bench import models
from bench.client import Answer, Request, ask_all, steady_tokens_per_second
from bench.contestants import Contestant, end_in_order, ours
from bench.environment import heading, table
from bench.figures import cell, median, median_ratio, milliseconds, percentile, value_range
from bench.prompts import Prompts

WITHOUT, WITH = "without", "a schema each"
Rounds = dict[str, list[list[Answer]]]  # round by round

# Of what the streams write lists of, in turn.
_ITEMS: list[dict[str, Any]] = [
    {"type": "string", "minLength": 20, "maxLength": 60},
    {"type": "number", "minimum": 0.5, "maximum": 1e6},
    {"enum": ["red", "green", "blue", "something else altogether"]},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,12}( [A-Z][a-z]{2,12}){1,3}$"},
    {"type": "string", "format": "date-time"},
    {"anyOf": [{"type": "string", "minLength": 8, "maxLength": 20}, {"type": "integer"}, {"type": "null"}]},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="packed")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.tokens, arguments.rounds = 4, 16, 1
    end_in_order()
    with contextlib.ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder = models.prepare(arguments.model, scratch)
        prompts = Prompts(folder)
        options = {"ranks": arguments.ranks, "PREFIX_CACHE": False}
        server = cleanup.enter_context(ours("ours", folder, scratch, prompts.banned_token_ids(), **options))
        print(heading(f"Grammar masks, {arguments.model} model, P = {arguments.ranks}"))
        print(f"{arguments.streams} streams, {arguments.tokens} tokens an answer, {arguments.rounds} rounds\n")
        print(comparison(run(server, prompts, arguments.streams, arguments.tokens, arguments.rounds)))


def run(server: Contestant, prompts: Prompts, streams: int, tokens: int, num_rounds: int) -> Rounds:
    """`num_rounds` that count after one that does not, in which the schemas are compiled; who begins changes."""
    rounds: Rounds = {WITHOUT: [], WITH: []}
    for turn in range(num_rounds + 1):
        for way in list(rounds)[:: -1 if turn % 2 else 1]:
            requests = [
                Request(prompts.short(f"{turn}, {stream}"), tokens, response_format(stream) if way == WITH else None)
                for stream in range(streams)
            ]
            answers = ask_all(server.target, requests)
            assert all(answer.num_tokens == tokens for answer in answers), "an answer ended before its limit"
            assert way == WITHOUT or all(answer.text.startswith("{") for answer in answers), "no grammar was followed"
            if turn:
                rounds[way].append(answers)
    return rounds


def response_format(stream: int) -> dict[str, Any]:
    """JSON that does not end before the answer's limit; no two streams have the same schema."""
    entry = {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": stream}, "value": _ITEMS[stream % len(_ITEMS)]},
        "required": ["id", "value"],
        "additionalProperties": False,
    }
    entries = {"type": "array", "items": entry, "minItems": 10_000}
    schema = {"type": "object", "properties": {f"entries_{stream}": entries}, "required": [f"entries_{stream}"]}
    described = {"name": f"schema_{stream}", "strict": True, "schema": schema | {"additionalProperties": False}}
    return {"type": "json_schema", "json_schema": described}


def comparison(rounds: Rounds) -> str:
    rates = {way: [steady_tokens_per_second(answers) for answers in answered] for way, answered in rounds.items()}
    rows = []
    for way, answered in rounds.items():
        gaps = [gap for answers in answered for answer in answers for gap in answer.gaps]
        rows.append(
            [
                way,
                cell(median(rates[way]), 1),
                value_range(rates[way]),
                *(milliseconds(percentile(gaps, percent)) for percent in (50, 99)),
                cell(median_ratio(rates[way], rates[WITHOUT]), 3),
            ]
        )
    columns = ["schemas", "tok/s while all run", "range", "gap p50, ms", "p99", "over without"]
    return table(columns, rows)


if __name__ == "__main__":
    main()
