"""Who asks: what of a request's sender the log says, and what limits count by. Made by routes, plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import Request

MAX_LOGGED = 64  # characters of a client's word that the log repeats


@dataclass(frozen=True)
class Caller:
    """Who asks: the label of the API key, and what the client says of itself (`user`, `safety_identifier`)."""

    label: str | None = None
    said: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """For the log. What the client says is in quotes and escaped, so it cannot make a line of its own."""
        words = [f" {name}={value[:MAX_LOGGED]!r}" for name, value in self.said.items()]
        return "".join([f" key={self.label}" if self.label else "", *words])


def caller_of(request: Request, **said: str | None) -> Caller:
    """`said`: what the client says of itself; None and empty words are left out."""
    label = getattr(request.state, "api_key_label", None)
    return Caller(label, {name: value for name, value in said.items() if value})
