"""Turns the embedded model's GGUF into MLX folders: weights, config and tokenizer, packed as they come or in float32.

It knows llama's tensors in Q4_1 and Q8_0, which is what that file holds, and byte-level BPE as llama.cpp's "smollm"
tokenizer does it. It never fetches, renames or checks anything: `builtin_model` does, and calls it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a llama GGUF whose matrices are Q4_1 or Q8_0 as a packed MLX folder.

    Scales and biases are stored as float32, so that activations are too and both forms give the same text.
    """
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors, metadata = loaded
    heads = {
        "attn_q": int(metadata["llama.attention.head_count"]),
        "attn_k": int(metadata["llama.attention.head_count_kv"]),
    }
    weights: dict[str, mx.array] = {}
    quantization: dict[str, Any] = {"group_size": 32, "bits": 4}
    for name, tensor in tensors.items():
        module, kind = mlx_name(name).rsplit(".", 1)
        permuted = next((count for part, count in heads.items() if f".{part}." in name), None)
        if permuted is not None:
            tensor = unpermute_rows(tensor, permuted)
        if kind == "weight" and tensor.dtype == mx.uint32:
            bits = tensor.shape[-1] // tensors[name.removesuffix("weight") + "scales"].shape[-1]  # uint32s of 32 values
            if bits != quantization["bits"]:
                quantization[module] = {"group_size": 32, "bits": bits}
        elif tensor.dtype != mx.uint32:
            tensor = tensor.astype(mx.float32)
        weights[f"{module}.{kind}"] = tensor

    config = _config(metadata, tied="lm_head.weight" not in weights)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(folder / "config.json", {**config, "quantization": quantization})
    _write_tokenizer(metadata, folder)
    _write_json(folder / "generation_config.json", {key: config[key] for key in config if key.endswith("token_id")})


def unpack(packed: Path, folder: Path) -> None:
    """Writes a packed folder's float32 form: same names, same values, no quantization."""
    tensors: Any = mx.load(str(packed / "model.safetensors"))
    config = json.loads((packed / "config.json").read_text())
    quantization = config.pop("quantization")
    weights: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        if kind in ("scales", "biases"):
            continue
        if f"{module}.scales" in tensors:
            params = quantization.get(module, quantization)
            tensor = mx.dequantize(
                tensor,
                tensors[f"{module}.scales"],
                tensors[f"{module}.biases"],
                group_size=params["group_size"],
                bits=params["bits"],
            )
        weights[name] = tensor
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(folder / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(packed / name, folder / name)


def mlx_name(name: str) -> str:
    """mlx-lm's name of a llama tensor in a GGUF: "blk.3.attn_q.scales" -> "model.layers.3.self_attn.q_proj.scales"."""
    parts = name.split(".")
    if parts[0] == "blk":
        return ".".join(["model.layers", parts[1], _LAYER_PARTS[parts[2]], parts[3]])
    return f"{_OTHER_PARTS[parts[0]]}.{parts[1]}"


def unpermute_rows(tensor: Any, num_heads: int) -> Any:
    """Undoes llama.cpp's order of q and k rows (pairs of rotated dimensions side by side) for half-split RoPE."""
    rows = tensor.shape[0]
    pairs = tensor.reshape(num_heads, rows // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type


def _config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": int(metadata["llama.embedding_length"]),
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_attention_heads": int(metadata["llama.attention.head_count"]),
        "num_key_value_heads": int(metadata["llama.attention.head_count_kv"]),
        "rms_norm_eps": round(float(metadata["llama.attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": int(metadata["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(metadata["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(metadata["tokenizer.ggml.padding_token_id"]),
    }


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json. llama.cpp calls this tokenizer "smollm": every digit by itself, then
    GPT-2's byte-level BPE."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    token_types = metadata["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[int(metadata["tokenizer.ggml.bos_token_id"])],
            "eos_token": tokens[int(metadata["tokenizer.ggml.eos_token_id"])],
            "pad_token": tokens[int(metadata["tokenizer.ggml.padding_token_id"])],
            "unk_token": tokens[int(metadata["tokenizer.ggml.unknown_token_id"])],
            "model_max_length": int(metadata["llama.context_length"]),
            "clean_up_tokenization_spaces": False,
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
