"""The tiny models of every architecture with head dimensions that can be quantized: multiples of 32 in place of 16."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from tests.distributed.tiny_models import COMMON, TINY

# Widths that go with the head dimension, and by how much; latent attention adds two of them up.
DOUBLED = {
    *("hidden_size", "hidden_dim", "n_embd", "d_model", "block_dim", "model_dim", "mamba_d_ssm", "mamba_d_head"),
    *("head_dim", "kv_channels", "hidden_size_per_head", "global_head_dim", "swa_head_dim", "swa_v_head_dim"),
    *("v_head_dim", "qk_nope_head_dim", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("kv_lora_rank", "q_lora_rank", "rotary_dim", "query_pre_attn_scalar", "long_factor", "short_factor"),
}
QUADRUPLED = {"qk_rope_head_dim"}


def build_wide(architecture: str, **changes: Any) -> nn.Module:
    """The architecture's model, with the same random weights at every call. `changes` go into its configuration."""
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    settings = _widened({"model_type": architecture, **COMMON, **TINY[architecture]}) | changes
    mx.random.seed(11)
    model = module.Model(module.ModelArgs.from_dict(settings))
    model.update(tree_map(lambda w: (w + 0.1 * mx.random.normal(w.shape)).astype(w.dtype), model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _widened(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: _wider(name, value) for name, value in copy.deepcopy(settings).items()}


def _wider(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _widened(value)
    factor = 2 if name in DOUBLED else 4 if name in QUADRUPLED else 1
    return value if factor == 1 or not isinstance(value, (int, list)) else value * factor
