"""The served model's tokenizer and what else its folder says to the api: text to ids, and ids back to text.

It is mlx-lm's own tokenizer and detokenizer, so prompts and answers are what mlx-lm would make. It loads no weights and
evaluates no array. The supervisor loads it when a ring is ready; the routes call it in a thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config, load_tokenizer

from api.chat.template import ChatTemplate
from api.errors import ContextLengthExceeded
from api.output import harmony
from api.output.parser import CALL, CONTENT, REASONING, Markers, OutputFormat, part_markers
from api.output.reader import HiddenTokens, OutputReader
from api.output.text import REPLACEMENT, TextStream
from api.output.tool_format import GENERIC, HARMONY, ToolFormat, native_format
from api.structured.grammar import SpecialTokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingDefaults:
    """What the model's generation_config.json asks for; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class ChatTokenizer:
    """Everything the api knows of one model folder. Its methods may be called from several threads."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        """Load the folder `path`, in Hugging Face's layout. Raises OSError or ValueError for a broken one."""
        self._files = _files(path)
        config = load_config(path)
        # Said either way: transformers would ask at the terminal.
        extra = {"trust_remote_code": trust_remote_code}
        self._tokenizer: TokenizerWrapper = load_tokenizer(path, extra, eos_token_ids=config.get("eos_token_id"))
        self.path = path
        self.sampling_defaults = _sampling_defaults(path)
        self.fingerprint = f"fp_{hashlib.sha256((path / 'config.json').read_bytes()).hexdigest()[:10]}"
        self.template = ChatTemplate(self._tokenizer)
        self.stop_token_ids: list[int] = sorted(self._stop_token_ids())
        if not self.template.exists:
            logger.warning("%s has no chat template: chat requests will be refused", path)

    def is_current(self) -> bool:
        """Whether the files that the folder held when this was loaded, weights too, are still the same."""
        return self._files.items() <= _files(self.path).items()

    # -- text to ids -------------------------------------------------------------------------------------------------

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text as it is, in no template. Control tokens that it spells out are control tokens."""
        if self.beginning is not None and text.startswith(self.beginning[0]):
            add_special_tokens = False  # as in mlx-lm: a beginning that is there is not put there twice
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    @property
    def beginning(self) -> tuple[str, int] | None:
        """The token for the beginning of a text: how it is written, and its id."""
        text, token_id = self._tokenizer.bos_token, self._tokenizer.bos_token_id
        return None if text is None or token_id is None else (text, token_id)

    def is_surely_longer(self, text: str, max_tokens: int) -> bool:
        """Whether `text` has more than `max_tokens` tokens, as far as its length alone tells."""
        return len(text) > self.max_characters(max_tokens)

    def max_characters(self, num_tokens: int) -> int:
        """What so many tokens can surely not stand for more than; the factor is for those that shorten text first."""
        return 4 * num_tokens * self._longest_token

    # -- ids to text -------------------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt's ids, control tokens included."""
        return self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)

    def token_text(self, token_id: int) -> tuple[str, list[int] | None]:
        """A token's text and exact bytes, which may be a part of a character. A control token has no bytes."""
        if token_id in self._added_tokens:
            token = self._added_tokens[token_id]
            return token.content, None if token_id in self._special_ids else list(token.content.encode())
        if not 0 <= token_id < len(self._tokenizer):
            return "", None
        if self._byte_tokenizer is None:
            text = self.decode([token_id])
            return text, None if REPLACEMENT in text else list(text.encode())
        data = self._byte_tokenizer.decode_bytes([token_id])
        return data.decode("utf-8", "replace"), list(data)

    def load_bytes(self) -> None:
        """What `token_text` needs, a second of work for a large vocabulary: better done in a thread."""
        _ = self._byte_tokenizer

    def output_reader(self, output: OutputFormat, stop: Sequence[str]) -> OutputReader:
        """For one choice of the answer to a request."""
        if output.shown_as:
            shown_as = {self._id_of(token): text for token, text in output.shown_as.items()}
            hidden, shows_special = HiddenTokens(self._never_text, self._special_ids, frozenset(), shown_as), False
        else:
            in_markers = {token_id for marker in output.all_markers for token_id in self._encode_exactly(marker)}
            markers = in_markers & self._special_ids
            hidden = HiddenTokens(self._never_text, self._special_ids, markers)
            shows_special = bool(markers) or (output.tool_format is not None and not output.tool_format.is_json)
        text = TextStream(self._tokenizer.detokenizer)
        if output.continues_text:
            for token_id in self._encode_exactly("a"):  # no matter what: now a leading space is not dropped
                text.add(token_id)
        return OutputReader(text, output, stop, hidden, self._special_texts if shows_special else None)

    # -- what the model can do ---------------------------------------------------------------------------------------

    @cached_property
    def native_tools(self) -> ToolFormat | None:
        """The model's own format of calls, where its template has a place for tools and mlx-lm can read the calls."""
        has_place = self.template.takes("tools") and self.template.names("tool_calls")
        if not has_place:
            return None
        return HARMONY if self.template.is_harmony else native_format(self._tokenizer)

    @cached_property
    def call_token_id(self) -> int | None:
        """The token without which the model begins no call, None where what begins one is text."""
        token_ids = self._encode_exactly((native_format(self._tokenizer) or GENERIC).start)
        return token_ids[0] if len(token_ids) == 1 and token_ids[0] in self._added_tokens else None

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """As grammars name them."""
        return SpecialTokens.of(self._added_tokens, self.stop_token_ids)

    @property
    def can_think(self) -> bool:
        return self.template.is_harmony or self.thinking_markers is not None

    @property
    def thinking_markers(self) -> tuple[str, str] | None:
        """What begins and what ends the model's reasoning."""
        start, end = self._tokenizer.think_start, self._tokenizer.think_end
        return (start, end) if self.template.can_think and start and end else None

    def is_in_thinking(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends inside a block of reasoning."""
        if self.thinking_markers is None:
            return False
        return self._tokenizer.rfind_think_start(prompt) > self._tokenizer.rfind_think_end(prompt)

    def markers(self, tool_format: ToolFormat | None) -> Markers:
        """The markers of an answer in which calls are written in this format."""
        if self.template.is_harmony:
            return harmony.markers(CONTENT, REASONING, CALL if tool_format else None)
        return part_markers(self._tokenizer, tool_format)

    @property
    def first_part(self) -> str | None:
        """The part that every answer begins in, where the model has such a thing."""
        return harmony.HEADER if self.template.is_harmony else self._tokenizer.response_initial_state

    # -- its tokens --------------------------------------------------------------------------------------------------

    def _stop_token_ids(self) -> set[int]:
        stops: set[int] = set(self._tokenizer.eos_token_ids)
        if self.template.is_harmony:  # where the folder names only one of them
            stops |= {self._id_of(token) for token in harmony.STOPS}
        return stops

    def _id_of(self, token: str) -> int:
        return self._tokenizer.convert_tokens_to_ids(token)

    def _encode_exactly(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def _added_tokens(self) -> dict[int, Any]:
        return dict(getattr(self._tokenizer, "added_tokens_decoder", {}))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = [token_id for token_id, token in self._added_tokens.items() if token.special]
        return frozenset([*self._tokenizer.all_special_ids, *added])

    @cached_property
    def _special_texts(self) -> re.Pattern[str]:
        texts = [self._added_tokens[token_id].content for token_id in self._special_ids & self._added_tokens.keys()]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _never_text(self) -> frozenset[int]:
        """Ends of a turn, and ids of a padded vocabulary that the tokenizer does not know."""
        padding = range(len(self._tokenizer), len(self._tokenizer) + 4096)
        return frozenset([*self.stop_token_ids, *padding])

    @cached_property
    def _longest_token(self) -> int:
        return max(len(token) for token in self._tokenizer.get_vocab())

    @cached_property
    def _byte_tokenizer(self) -> LLTokenizer | None:
        """Knows each token's bytes, of byte-level and byte-fallback vocabularies; None for tokenizers in Python."""
        try:
            return from_tokenizer(self._tokenizer._tokenizer, slices=[])
        except ValueError:
            return None


def context_length_exceeded(max_tokens: int, resulted_in: str) -> ContextLengthExceeded:
    """OpenAI's words for a prompt that is too long."""
    return ContextLengthExceeded(
        f"This model's maximum context length is {max_tokens} tokens. However, your messages resulted in "
        f"{resulted_in}. Please reduce the length of the messages.",
        param="messages",
    )


def _sampling_defaults(path: Path) -> SamplingDefaults:
    file = path / "generation_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        logger.warning("%s is not JSON (%s); its sampling defaults are not used", file, error)
        values = {}
    names = SamplingDefaults.__dataclass_fields__
    numbers = {name: values.get(name) for name in names if type(values.get(name)) in (int, float)}
    return SamplingDefaults(**numbers)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, by name: enough to see that one was replaced."""
    found = ((path.name, path.stat()) for path in folder.iterdir() if path.is_file()) if folder.is_dir() else ()
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found}
