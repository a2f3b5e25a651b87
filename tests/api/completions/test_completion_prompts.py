"""What a raw prompt is in tokens: as mlx-lm encodes a text, control tokens included."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from tokenizers import Tokenizer, processors

from api.completions.prompts import completion_prompts
from api.errors import ContextLengthExceeded, InvalidRequest
from api.schemas.completions import CompletionRequest
from api.tokenizer import ChatTokenizer
from tests.api.fake_engine import READY
from tests.tiny_chat_model import VOCAB_SIZE

MODEL = msgspec.structs.replace(READY, vocab_size=VOCAB_SIZE)


def encoded(tokenizer: ChatTokenizer, prompt: Any) -> list[list[int]]:
    return completion_prompts(CompletionRequest(model="m", prompt=prompt), tokenizer, MODEL)


def with_config(model: Path, folder: Path, **changes: Any) -> Path:
    """The tiny model with another tokenizer_config.json."""
    copy = Path(shutil.copytree(model, folder / "copy"))
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return copy


def with_beginning(model: Path, folder: Path) -> Path:
    """The tiny model with a tokenizer that puts its BOS before every text, as Llama's do."""
    copy = Path(shutil.copytree(model, folder / "copy"))
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    begin = "<|im_start|>"
    post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.post_processor = post_processor  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


def test_a_text_is_what_mlx_lm_makes_of_it(tiny_chat_model: Path):
    for text in ("Grüße, 世界", "one\n\n two", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"):
        assert encoded(ChatTokenizer(tiny_chat_model), [text, "x"])[0] == load(tiny_chat_model).encode(text)


def test_control_tokens_in_a_raw_prompt_are_control_tokens(tiny_chat_model: Path):
    end = load(tiny_chat_model).convert_tokens_to_ids("<|im_end|>")
    (ids,) = encoded(ChatTokenizer(tiny_chat_model), "hi<|im_end|>")
    assert ids[-1] == end


def test_the_beginning_of_a_text_is_there_once(tiny_chat_model: Path, tmp_path: Path):
    tokenizer = ChatTokenizer(with_beginning(tiny_chat_model, tmp_path))
    begin = load(tiny_chat_model).convert_tokens_to_ids("<|im_start|>")
    plain, spelled_out = encoded(tokenizer, ["one", "<|im_start|>one"])
    assert plain == spelled_out == [begin, *load(tiny_chat_model).encode("one")]


@pytest.mark.parametrize("prompt", ["", None, [""]])
def test_an_empty_prompt_is_the_beginning_of_a_text(tiny_chat_model: Path, tmp_path: Path, prompt: Any):
    begin = load(tiny_chat_model).convert_tokens_to_ids("<|im_start|>")
    assert encoded(ChatTokenizer(tiny_chat_model), prompt) == [[begin]]
    assert encoded(ChatTokenizer(with_beginning(tiny_chat_model, tmp_path)), prompt) == [[begin]]


def test_an_empty_prompt_is_refused_where_texts_have_no_beginning(tiny_chat_model: Path, tmp_path: Path):
    tokenizer = ChatTokenizer(with_config(tiny_chat_model, tmp_path, bos_token=None))
    with pytest.raises(InvalidRequest, match="no token for the beginning") as raised:
        encoded(tokenizer, ["one", ""])
    assert raised.value.param == "prompt[1]"


def test_megabytes_are_refused_before_they_are_tokenized(tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    def encodes(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenized")

    tokenizer = ChatTokenizer(tiny_chat_model)
    monkeypatch.setattr(TokenizerWrapper, "encode", encodes, raising=False)
    with pytest.raises(ContextLengthExceeded, match="100000 characters"):
        encoded(tokenizer, "x" * 100_000)
