"""Grammars of answers in harmony, the format of gpt-oss (api.output.harmony): the messages that an answer may be.

Made of the parts of `api.structured.grammar`. An answer begins behind `<|start|>assistant`, inside a header; it may
reason, and ends with one message, to the user or to a function. Called by `api.chat.prompt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from api.structured.grammar import START, TEXT, answer_rule
from api.structured.request_schemas import Function, arguments_rules


def harmony_answer(
    token_ids: Mapping[str, int],
    *,
    content: str | None,
    functions: Sequence[Function],
    calls_only: bool,
    reasons: bool,
    is_begun: bool,
) -> str:
    """An answer to a request that enforces something of it.

    Args:
        token_ids: of harmony's tokens.
        content: the grammar of what is said to the user, by `json_object` or `json_schema`; None: any text, and
            some before a call too.
        functions: that may be called. Their schemas are enforced as those of `grammar.tool_calls`.
        calls_only: the answer is a call.
        reasons: the model may think before it answers.
        is_begun: the prompt ends inside of what is said to the user.

    Raises:
        InvalidRequest, UnsupportedParameter: they name the function's `param` and the place in the schema.
    """
    start, channel, constrain, message, end = (
        f"<[{token_ids[f'<|{name}|>']}]>" for name in ("start", "channel", "constrain", "message", "end")
    )
    said = "TEXT?" if content is None else answer_rule(content)
    to_next = f'{end} {start} "assistant"'
    rules = {"said": said, "final": f'{channel} "final" {message} said'}
    for name in ("analysis", "commentary"):  # the latter is a preamble, for the user
        rules[name] = f'{channel} "{name}" {message} TEXT? {to_next}'
    arguments = arguments_rules(functions, required=calls_only or content is not None) if functions else {}
    calls = [f'{json.dumps(f"{name} ")} {constrain} "json" {message} {rule}' for name, rule in arguments.items()]
    rules |= {f"call{place}": rule for place, rule in enumerate(calls)}
    rules["call"] = (
        f'{channel} "commentary to=functions." ({" | ".join(f"call{place}" for place in range(len(calls)))})'
    )

    before = ["analysis"] * reasons + ["commentary"] * (bool(calls) and content is None and not calls_only)
    last = ["final"] * (not calls_only) + ["call"] * bool(calls)
    rules["whole"] = (f"({' | '.join(before)})* " if before else "") + f"({' | '.join(last)})"
    rules["answer"] = f"said ({to_next} whole)?" if is_begun else "whole"
    written = "".join(f"{name}: {rule}\n" for name, rule in rules.items() if name != "call" or calls)
    return f"{START}{written}{TEXT}"
