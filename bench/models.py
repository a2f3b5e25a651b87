"""The models that the benchmarks serve, in folders that every contestant can load.

`mlx_lm.server --pipeline` takes no llama and wants an index of the weight files. So SmolLM2 is dressed as a qwen2,
which is the same network with biases: they are zeros here, and its weights are links to the embedded model's files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.utils import quantize_model

from distributed.builtin_model import FLOAT32, PACKED
from distributed.model_files import prepare_model
from tests.running_server import PROJECT
from tests.tiny_chat_model import write_tokenizer

SMOLLM2 = {"packed": PACKED, "float32": FLOAT32}
NAMES = [*SMOLLM2, "moe"]

# 200 million weights in experts, of which a token uses an eighth: a step costs the more the more rows it has.
_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
_LAYERED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def prepare(name: str, scratch: Path) -> Path:
    """The folder of one of `NAMES`, written under `scratch`."""
    folder = scratch / f"model-{name}"
    return write_moe(folder) if name == "moe" else dress_as_qwen2(prepare_model(SMOLLM2[name], PROJECT), folder)


def dress_as_qwen2(llama_folder: Path, folder: Path) -> Path:
    """Writes `folder`: the llama of `llama_folder` as a qwen2 with zeros for its q, k and v biases."""
    folder.mkdir(parents=True)
    config = json.loads((llama_folder / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    widths = {
        "q_proj": config["num_attention_heads"] * head_dim,
        "k_proj": config["num_key_value_heads"] * head_dim,
        "v_proj": config["num_key_value_heads"] * head_dim,
    }
    biases = {
        f"model.layers.{layer}.self_attn.{projection}.bias": mx.zeros(width)
        for layer in range(config["num_hidden_layers"])
        for projection, width in widths.items()
    }
    mx.save_safetensors(str(folder / "model-biases.safetensors"), biases, metadata={"format": "mlx"})
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (llama_folder / name).exists():
            (folder / name).symlink_to((llama_folder / name).absolute())
    weights = mx.load(str(llama_folder / "model.safetensors"))
    assert isinstance(weights, dict)
    weight_map = {name: "model.safetensors" for name in weights} | {name: "model-biases.safetensors" for name in biases}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _write_json(folder / "config.json", config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    return folder


def write_moe(folder: Path) -> Path:
    """Writes a random mixture of experts, 4-bit as people run them, with the tests' tokenizer."""
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    config = _MOE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    mx.random.seed(0)
    model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
    _write_model(folder, *quantize_model(model, config, group_size=64, bits=4))
    return folder


def write_layered(folder: Path, num_layers: int) -> Path:
    """Writes a model of many layers and hardly any weights, for a simulation that replaces its layers."""
    folder.mkdir(parents=True)
    config = _LAYERED | {"num_hidden_layers": num_layers}
    _write_model(folder, llama.Model(llama.ModelArgs.from_dict(config)), config)
    return folder


def _write_model(folder: Path, model: Any, config: dict[str, Any]) -> None:
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
