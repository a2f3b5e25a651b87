"""Chat prompts of any length that share nothing but the template's first tokens, so that no prefix cache helps.

Made from a label alone: the same label gives every contestant the same prompt, another label another one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from bench.client import Messages

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
).split()
_SMALL_VOCABULARY = 1000
_UNIQUE_WORDS = 4  # at the start of a prompt: 60^4 beginnings


class Prompts:
    """Of one model's tokenizer, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: TokenizerWrapper = load_tokenizer(folder)

    def banned_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer. In a vocabulary of bytes also those that are no text by themselves: half a character
        or a space, of which a stream shows nothing yet, and a random model might say nothing else.
        """
        ends = set(self.tokenizer.eos_token_ids) | set(self.tokenizer.all_special_ids)
        if (vocabulary := len(self.tokenizer)) < _SMALL_VOCABULARY:
            texts = {token_id: self.tokenizer.decode([token_id]) for token_id in range(vocabulary)}
            ends |= {token_id for token_id, text in texts.items() if "\ufffd" in text or not text.strip()}
        return tuple(sorted(ends))

    def short(self, label: str) -> Messages:
        """Some twenty tokens of a large vocabulary."""
        return [_system(label), {"role": "user", "content": "Go on."}]

    def of_length(self, num_tokens: int, label: str) -> Messages:
        """At most `num_tokens` in the chat template, as few less as whole words allow."""
        rng = random.Random(label)
        words = rng.choices(_WORDS, k=num_tokens)
        low, high = 0, num_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.count(self._with(label, words, middle)) <= num_tokens:
                low = middle
            else:
                high = middle - 1
        return self._with(label, words, low)

    def count(self, messages: Messages) -> int:
        """Tokens of the prompt that `messages` make."""
        return len(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def _with(self, label: str, words: Sequence[str], count: int) -> Messages:
        return [_system(label), {"role": "user", "content": " ".join(words[:count])}]


def _system(label: str) -> dict[str, str]:
    """A system message of unique words; without one, templates put in their own, which all prompts would share."""
    return {"role": "system", "content": " ".join(random.Random(label).choices(_WORDS, k=_UNIQUE_WORDS))}
