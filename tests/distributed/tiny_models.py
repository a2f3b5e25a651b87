"""A tiny random model of every architecture in mlx-lm, for tests of the cut: hidden size 64, a few layers, no files.

`TINY` holds what an architecture needs beyond `COMMON`; each `ModelArgs` picks the keys that it knows.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

VOCAB_SIZE = 96
WINDOW = 8  # shorter than the tests' prompts, so that rotating caches wrap

# What most configurations spell alike; a model's ModelArgs picks the keys it knows.
COMMON: dict[str, Any] = dict(
    hidden_size=64,
    num_hidden_layers=4,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=VOCAB_SIZE,
    rms_norm_eps=1e-5,
    layer_norm_eps=1e-5,
    layer_norm_epsilon=1e-5,
    layernorm_epsilon=1e-5,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    partial_rotary_factor=0.5,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    use_bias=False,
    use_qk_norm=True,
    sliding_window=WINDOW,
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    shared_intermediate_size=32,
    n_shared_experts=1,
    num_shared_experts=1,
    norm_topk_prob=True,
    n_group=1,
    topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    routed_scaling_factor=1.0,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    # latent attention
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    index_head_dim=16,
    index_n_heads=2,
    index_topk=6,
    # state spaces and linear attention
    conv_kernel=3,
    conv_bias=True,
    conv_L_cache=3,
    use_conv_bias=True,
    n_groups=2,
    layer_group_size=2,
    group_norm_size=1,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=3,
    # scaling factors of the granites
    attention_multiplier=0.25,
    embedding_multiplier=2.0,
    residual_multiplier=0.5,
    logits_scaling=2.0,
)

YARN = dict(type="yarn", rope_type="yarn", factor=4.0, original_max_position_embeddings=128, rope_theta=10000.0)
SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
FULL_SLIDING = ["full_attention", "sliding_attention"] * 2
GPT = dict(n_embd=64, n_layer=4, n_inner=96, n_head=4, n_positions=512, n_ctx=512, rotary_dim=8)
LONGCAT = dict(
    attention_method="MLA",
    zero_expert_type="identity",
    ffn_hidden_size=96,
    moe_topk=2,
    expert_ffn_hidden_size=32,
    zero_expert_num=2,
    num_layers=4,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
    ngram_vocab_size_ratio=3,
    emb_neighbor_num=3,
    emb_split_num=2,
)
LFM2 = dict(
    full_attn_idxs=[1, 3],
    block_dim=64,
    block_ff_dim=96,
    block_multiple_of=8,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=True,
)
MINICPM = dict(dim_model_base=32, scale_depth=1.4, scale_emb=2.0)
GEMMA4 = dict(
    num_hidden_layers=10,
    global_head_dim=32,
    vocab_size_per_layer_input=VOCAB_SIZE,
    num_kv_shared_layers=4,
    hidden_size_per_layer_input=8,
    sliding_window_pattern=5,
    partial_rotary_factor=1.0,
    tie_word_embeddings=True,
)
KDA = dict(num_heads=4, head_dim=16, kda_layers=[1, 3], full_attn_layers=[2, 4], short_conv_kernel_size=4)


def text(architecture: str | None = None, **more: Any) -> dict[str, Any]:
    """A model whose configuration nests that of its language model."""
    nested = {**COMMON, **more}
    return dict(text_config={**nested, "model_type": architecture} if architecture else nested)


TINY: dict[str, dict[str, Any]] = {
    "Klear": dict(mlp_only_layers=[0]),
    "afm7": dict(hidden_dim=64, num_layers=6, num_kv_reuse_layers=3, num_heads=4, num_kv_heads=2),
    "afmoe": dict(layer_types=FULL_SLIDING, num_dense_layers=1),
    "apertus": dict(post_norm=True, qk_norm=True),
    "baichuan_m1": dict(sliding_window_layers=[0, 2], conv_window=2),
    "bailing_hybrid": dict(num_key_value_heads=4, num_hidden_layers=5),
    "bailing_moe": dict(topk_group=1),
    "bailing_moe_linear": dict(num_key_value_heads=4, num_hidden_layers=5),
    "bailing_moe_v3": dict(layer_group_size=2, num_key_value_heads=4),
    "bitnet": {},
    "cohere": {},
    "cohere2": dict(sliding_window_pattern=2),
    "dbrx": dict(
        d_model=64,
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        n_layers=4,
        n_heads=4,
    ),
    "deepseek": {},
    "deepseek_v2": dict(rope_scaling=YARN, topk_method="greedy"),
    "deepseek_v3": dict(rope_scaling=YARN, n_group=2),
    "deepseek_v32": {},
    "deepseek_v41": dict(
        o_groups=2,
        o_lora_rank=16,
        compress_ratios=[2] * 4,
        kv_source_layer_ids=[0, 2],
        index_source_layer_ids=[0, 2],
        candidate_source_layer_id=0,
        candidate_topk_blocks=2,
        candidate_block_size=2,
        hc_mult=2,
        index_topk=4,
        scoring_func="sqrtsoftplus",
    ),
    "dots1": dict(scoring_func="noaux_tc"),
    "ernie4_5": {},
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2),
    "exaone": dict(num_layers=4),
    "exaone4": dict(sliding_window_pattern="LLGL"),
    "exaone_moe": dict(layer_types=SLIDING_FULL, is_moe_layer=[False, True, True, True]),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16),
    "gear": dict(
        layer_types=["conv_mixer", "full_attention", "sliding_attention", "conv_mixer", "full_attention"],
        num_hidden_layers=5,
    ),
    "gemma": {},
    "gemma2": {},
    "gemma3": text("gemma3_text", sliding_window_pattern=2, query_pre_attn_scalar=16),
    "gemma3_text": dict(sliding_window_pattern=3, num_hidden_layers=6, query_pre_attn_scalar=16),
    "gemma3n": text(
        "gemma3n",
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB_SIZE,
        rope_local_base_freq=100.0,
        final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.5] * 6,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        altup_coef_clip=1.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=8,
    ),
    "gemma4": text("gemma4_text", **GEMMA4),
    "gemma4_text": GEMMA4,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": dict(num_key_value_heads=4),
    "glm_moe_dsa": dict(rope_parameters=dict(rope_theta=10000.0, rope_type="default")),
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5),
    "gpt_oss": dict(layer_types=SLIDING_FULL),
    "gptj": GPT,
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"] * 2,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_proj_bias=False,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_n_groups=1,
        mamba_conv_bias=False,
    ),
    "helium": {},
    "hunyuan": dict(
        moe_topk=2,
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling=dict(alpha=1000.0, factor=1.0, type="dynamic"),
    ),
    "hunyuan_v1_dense": dict(rope_scaling=dict(YARN, alpha=1000.0, type="dynamic", beta_fast=32, beta_slow=1)),
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": dict(loop_num=2, loop_window_size=WINDOW),
    "jamba": dict(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=16,
        mamba_expand=2,
    ),
    "kimi_k25": text("kimi_k2"),
    "kimi_k3": text(
        "kimi_linear",
        linear_attn_config=KDA,
        attn_res_block_size=2,
        activation_situ_beta=1.0,
        activation_situ_linear_beta=1.0,
        num_key_value_heads=4,
        routed_expert_hidden_size=32,
    ),
    "kimi_linear": dict(linear_attn_config=KDA, model_max_length=512, num_key_value_heads=4),
    "kimi_vl": text("deepseek_v3"),
    "laguna": dict(
        layer_types=FULL_SLIDING,
        rope_parameters=dict(
            full_attention=dict(YARN, beta_slow=1.0, beta_fast=32.0, partial_rotary_factor=0.5),
            sliding_attention=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0),
        ),
    ),
    "lfm2": LFM2,
    "lfm2-vl": text("lfm2", **LFM2),
    "lfm2_moe": dict(full_attn_idxs=[1, 3], use_expert_bias=True, num_dense_layers=1),
    "lille-130m": dict(block_size=128, n_embd=64, n_head=4, n_kv_heads=2, n_layer=4),
    "llama": dict(layer_types=FULL_SLIDING),
    "llama4": text(
        "llama4",
        attention_chunk_size=WINDOW,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=96,
        num_hidden_layers=5,
        num_experts_per_tok=1,
    ),
    "llama4_text": dict(intermediate_size_mlp=96, no_rope_layers=[0, 0, 1, 1]),
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mamba": dict(state_size=8, time_step_rank=4),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=16, time_step_limit=(0.01, 10.0), time_step_rank="auto"),
    "mellum": dict(
        layer_types=FULL_SLIDING,
        rope_parameters={kind: dict(rope_theta=10000.0, rope_type="default") for kind in FULL_SLIDING[:2]},
    ),
    "mimo": {},
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[0, 1, 0, 1],
        moe_layer_freq=[0, 1, 0, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=WINDOW,
        swa_rope_theta=100.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        swa_v_head_dim=16,
    ),
    "minicpm": MINICPM,
    "minicpm3": dict(MINICPM, rope_scaling=dict(short_factor=1.0, long_factor=1.0)),
    "minimax": dict(rotary_dim=8, num_key_value_heads=4),
    "minimax_m3_vl": text(
        dense_intermediate_size=64,
        moe_layer_freq=[0, 1, 1, 1],
        index_block_size=2,
        index_topk_blocks=2,
        sparse_attention_freq=[0, 1, 1, 1],
    ),
    "ministral3": dict(
        layer_types=FULL_SLIDING,
        rope_parameters=dict(YARN, llama_4_scaling_beta=0.5, original_max_position_embeddings=4),
    ),
    "mistral3": text("llama"),
    "mistral4": dict(rope_parameters=dict(YARN, llama_4_scaling_beta=0.5, original_max_position_embeddings=4)),
    "mixtral": {},
    "muse_glimmer": {},
    "muse_spark": text(
        post_norm_eps=1e-5,
        rope_parameters=dict(rope_theta=10000.0),
        layer_rope_theta=[10000.0, 0.0] * 2,
        layer_types=SLIDING_FULL,
        final_logit_softcapping=30.0,
        output_multiplier=0.5,
        moe_hidden_size=32,
        num_shared_experts=0,
    ),
    "nanbeige": dict(num_loops=2),
    "nanochat": {},
    "nemotron": dict(hidden_act="gelu"),
    "nemotron-nas": dict(
        block_configs=[
            dict(
                attention=dict(n_heads_in_group=2, no_op=layer == 1, replace_with_linear=False),
                ffn=dict(ffn_mult=1.3, no_op=layer == 2, replace_with_linear=False),
            )
            for layer in range(4)
        ]
    ),
    "nemotron_h": dict(
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_proj_bias=False,
        ssm_state_size=16,
        moe_shared_expert_intermediate_size=32,
        hybrid_override_pattern=["M", "-", "*", "M", "E", "*"],
    ),
    "olmo2": {},
    "olmo3": dict(layer_types=SLIDING_FULL),
    "olmo_hybrid": dict(layer_types=["linear_attention", "full_attention"] * 2, linear_allow_neg_eigval=True),
    "olmoe": {},
    "openelm": dict(
        ffn_dim_divisor=8,
        ffn_multipliers=[1.0, 1.5, 2.0, 1.0],
        model_dim=64,
        num_kv_heads=[2] * 4,
        num_query_heads=[4] * 4,
        num_transformer_layers=4,
    ),
    "phi": dict(num_key_value_heads=4),
    "phi3": {},
    # It silences fixed ids: with a smaller vocabulary it would write past the logits.
    "phi3small": dict(vocab_size=100352, dense_attention_every_n_layers=2, ff_intermediate_size=96, gegelu_limit=20.0),
    "phimoe": dict(
        rope_scaling=dict(
            long_factor=[1.0] * 8,
            long_mscale=1.2,
            original_max_position_embeddings=4096,
            short_factor=[1.0] * 8,
            short_mscale=1.2,
            type="longrope",
        )
    ),
    "phixtral": dict(num_vocab=VOCAB_SIZE, model_dim=64, num_heads=4, num_layers=4, rotary_dim=8),
    "pixtral": text("llama"),
    "plamo": dict(n_shared_head=2),
    "plamo2": dict(
        hidden_size_per_head=16, mamba_d_state=8, mamba_num_heads=4, mamba_chunk_size=16, full_attention_idx=[]
    ),
    "plamo3": dict(window_size=WINDOW, sliding_window_pattern=2),
    "qwen": dict(kv_channels=16),
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": text("qwen2"),
    "qwen3": {},
    "qwen3_5": text("qwen3_5", num_experts=0, full_attention_interval=3),
    "qwen3_5_moe": text("qwen3_5_moe", full_attention_interval=3),
    "qwen3_moe": {},
    "qwen3_next": dict(full_attention_interval=3),
    "qwen3_vl": text("qwen3"),
    "qwen3_vl_moe": text("qwen3_moe"),
    "recurrent_gemma": dict(
        conv1d_width=3,
        logits_soft_cap=30.0,
        attention_window_size=WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "rwkv7": dict(a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8, decay_low_rank_dim=8),
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "spark2_5": dict(
        layer_types=SLIDING_FULL,
        rope_parameters={kind: dict(rope_theta=10000.0, rope_type="default") for kind in SLIDING_FULL[:2]},
    ),
    "stablelm": dict(use_qkv_bias=True),
    "starcoder2": {},
    "step3p5": dict(
        num_attention_groups=2,
        rope_theta=[10000.0] * 4,
        layer_types=FULL_SLIDING,
        partial_rotary_factors=[0.5, 1.0, 0.5, 1.0],
        attention_other_setting=dict(num_attention_heads=8, num_attention_groups=2),
        moe_num_experts=4,
        moe_top_k=2,
        share_expert_dim=32,
        moe_layers_enum="1,2,3",
    ),
    "talkie": {},
    "telechat3": {},
    "youtu_llm": dict(num_key_value_heads=4),
}


NEEDS_METAL = {"bitnet", "muse_spark"}  # their kernels have no CPU version
NO_TINY_MODEL = {
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "needs a packed checkpoint; apart from that it is qwen3_5",
}


def runnable() -> list[str]:
    """The architectures that run on this machine."""
    return [name for name in TINY if name not in NEEDS_METAL or mx.metal.is_available()]


def build(architecture: str) -> nn.Module:
    """The architecture's model, with the same random weights at every call."""
    return copy.deepcopy(_template(architecture))


@functools.lru_cache(maxsize=1)
def _template(architecture: str) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    args = module.ModelArgs.from_dict({"model_type": architecture, **COMMON, **TINY[architecture]})
    mx.random.seed(11)
    model = module.Model(args)
    # Gains and biases that start as ones and zeros would hide mistakes.
    model.update(tree_map(_shaken, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _shaken(weight: mx.array) -> mx.array:
    if not mx.issubdtype(weight.dtype, mx.floating):
        return weight
    return (weight + 0.1 * mx.random.normal(weight.shape)).astype(weight.dtype)
