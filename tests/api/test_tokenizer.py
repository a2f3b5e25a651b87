import json
import shutil
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from api.output.parser import OutputFormat
from api.tokenizer import ChatTokenizer, SamplingDefaults
from tests.api.chat.template_models import PYTHONIC, QWEN3, template_model


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_model: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_chat_model)


def test_the_end_of_a_turn_ends_an_answer(tokenizer: ChatTokenizer, tiny_chat_model: Path):
    assert tokenizer.stop_token_ids == [load(tiny_chat_model).convert_tokens_to_ids("<|im_end|>")]


def test_ids_beyond_the_tokenizer_are_no_text(tokenizer: ChatTokenizer):
    reader = tokenizer.output_reader(OutputFormat.plain(), [])
    assert reader.add([512, 513, 4000]) + reader.finish() == []
    assert tokenizer.token_text(513) == ("", None)


def test_a_raw_prompt_may_hold_control_tokens(tokenizer: ChatTokenizer):
    text = "<|im_start|>user\nGrüße<|im_end|>"
    ids = tokenizer.encode_prompt(text)
    assert {1, 2} <= set(ids)
    assert tokenizer.decode(ids) == text


def test_a_text_that_cannot_fit_is_known_by_its_length(tokenizer: ChatTokenizer):
    assert tokenizer.is_surely_longer("x" * 100_000, 8)
    assert not tokenizer.is_surely_longer("x" * 100, 8)


def test_a_token_has_its_exact_bytes(tokenizer: ChatTokenizer):
    text = "Grüße, 世界 🦊\n"
    ids = tokenizer.encode_prompt(text)
    assert any("\ufffd" in tokenizer.token_text(token_id)[0] for token_id in ids)
    assert b"".join(bytes(tokenizer.token_text(token_id)[1] or ()) for token_id in ids).decode() == text
    assert tokenizer.token_text(tokenizer.stop_token_ids[0]) == ("<|im_end|>", None)


def test_a_token_of_a_byte_fallback_vocabulary_has_its_exact_bytes(tiny_chat_model: Path, tmp_path: Path):
    byte_tokens = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab = byte_tokens | {"▁": 256, "a": 257, "▁a": 258, "é": 259, "<unk>": 260}
    model = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    model.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<unk>").save_pretrained(tmp_path)
    shutil.copy(tiny_chat_model / "config.json", tmp_path)
    tokenizer = ChatTokenizer(tmp_path)
    assert tokenizer.token_text(258) == (" a", list(b" a"))
    assert tokenizer.token_text(259) == ("é", list("é".encode()))
    assert tokenizer.token_text(0xF0) == ("\ufffd", [0xF0])


def test_special_tokens_are_named_for_grammars(tiny_chat_model: Path, tmp_path: Path):
    model = template_model(tiny_chat_model, tmp_path, PYTHONIC, special=["<|tool_call_start|>"])
    assert model.special_tokens.ids["<|tool_call_start|>"] == model.encode_prompt("<|tool_call_start|>")[0]
    assert list(model.special_tokens.stop_ids) == model.stop_token_ids


def test_what_a_model_can_do_is_read_from_its_template_and_vocabulary(
    tokenizer: ChatTokenizer, tiny_chat_model: Path, tmp_path: Path
):
    assert tokenizer.native_tools is None
    assert tokenizer.thinking_markers is None
    thinks = template_model(tiny_chat_model, tmp_path / "a", QWEN3, added=["<think>", "</think>"])
    assert thinks.native_tools is not None and thinks.native_tools.is_json
    assert thinks.thinking_markers == ("<think>", "</think>")
    # The tokens alone say nothing: models of a family share their vocabulary.
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    instructs = template_model(tiny_chat_model, tmp_path / "b", template, added=["<think>", "</think>"])
    assert instructs.thinking_markers is None


def test_the_model_s_own_sampling_is_read_and_nonsense_is_not(tiny_chat_model: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_chat_model, tmp_path / "copy"))
    generation_config = copy / "generation_config.json"
    generation_config.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": None, "min_p": "x"}))
    assert ChatTokenizer(copy).sampling_defaults == SamplingDefaults(temperature=0.6, top_k=20)
    generation_config.write_text("{")
    assert ChatTokenizer(copy).sampling_defaults == SamplingDefaults()
