"""The model's vocabulary as llguidance sees it: the bytes of every token, and one more token that ends a grammar.

What ends an answer differs between requests, so grammars end with a token of our own, which stands in a mask for the
stop ids of the request (`Vocabulary.mask`). Made once, by `server.grammar`, in a thread: it takes half a second.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLTokenizer

_END = "<|end of the grammar|>"


@dataclass(frozen=True)
class Stops:
    """One request's stop ids. `ends`: these. `within`: all tokens of the logits but those of these that are text."""

    ends: np.ndarray
    within: np.ndarray


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer may have more tokens than the model's logits have columns, `vocab_size`, or fewer."""

    tokenizer: LLTokenizer
    end_id: int
    vocab_size: int

    @property
    def num_words(self) -> int:
        """Of 32 bits, in a mask as llguidance makes it."""
        return -(-self.tokenizer.vocab_size // 32)

    def stops(self, stop_ids: Collection[int]) -> Stops:
        """Masks for a request that these ids end."""
        ends, within = np.zeros(self.vocab_size, np.bool_), np.ones(self.vocab_size, np.bool_)
        for token_id in stop_ids:
            if 0 <= token_id < self.vocab_size:
                ends[token_id] = True
                # Special tokens are allowed only where the grammar names them; text must not end an answer early.
                within[token_id] = self.tokenizer.is_special_token(token_id)
        return Stops(_words(ends), _words(within))

    def mask(self, allowed: np.ndarray, stops: Stops) -> np.ndarray:
        """What a request may draw, given what llguidance allows; both are words of 32 bits."""
        word, bit = divmod(self.end_id, 32)
        may_end = allowed[word] >> bit & 1
        allowed[word] &= ~np.uint32(1 << bit)
        mask = allowed[: len(stops.within)] & stops.within
        return mask | stops.ends if may_end else mask


def load_vocabulary(path: Path, vocab_size: int) -> Vocabulary:
    """Of the model in folder `path`, whose logits have `vocab_size` columns.

    Raises:
        OSError, ValueError, LookupError, TypeError: there is no tokenizer that llguidance can use.
    """
    file = path / "tokenizer.json"
    fields = json.loads(file.read_text(encoding="utf-8") if file.exists() else _converted(path))
    fields["truncation"] = fields["padding"] = None
    known = {token["content"] for token in fields["added_tokens"]}
    fields["added_tokens"] += [token for token in _configured_tokens(path) if token["content"] not in known]
    names = fields["model"]["vocab"]
    ids = list(names.values()) if isinstance(names, dict) else range(len(names))
    end_id = max([*ids, *(token["id"] for token in fields["added_tokens"])]) + 1
    fields["added_tokens"].append(_added_token(end_id, {"content": _END, "special": True}))
    # Counted from the vocabulary; where its ids have gaps, the end's id is out of range.
    tokenizer = LLTokenizer(json.dumps(fields), n_vocab=max(end_id + 1, vocab_size), eos_token=end_id)
    if tokenizer.tokenize_str(_END, parse_special=True) != [end_id]:
        raise ValueError("the ids of its tokens are not those it says")
    return Vocabulary(tokenizer, end_id, vocab_size)


def _converted(path: Path) -> str:
    """tokenizer.json for a folder with a tokenizer of another kind, where transformers can convert it."""
    from mlx_lm.utils import load_tokenizer

    backend = getattr(load_tokenizer(path), "backend_tokenizer", None)
    if backend is None:
        raise ValueError("it is written in Python")
    return backend.to_str()


def _configured_tokens(path: Path) -> list[dict[str, Any]]:
    """The tokens of tokenizer_config.json, in the order of their ids; some of them may be only there."""
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tokens = [_added_token(int(token_id), token) for token_id, token in config.get("added_tokens_decoder", {}).items()]
    return sorted(tokens, key=lambda token: token["id"])


def _added_token(token_id: int, token: dict[str, Any]) -> dict[str, Any]:
    """As tokenizer.json has it."""
    switches = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token_id, "content": token["content"], **{name: bool(token.get(name)) for name in switches}}


def _words(flags: np.ndarray) -> np.ndarray:
    """A flag a token, as a mask: in words of 32 bits."""
    octets = np.packbits(flags, bitorder="little")
    return np.pad(octets, (0, -len(octets) % 4)).view(np.uint32)
