"""A model folder that chats: a tiny random llama, a byte-level BPE tokenizer trained here, a ChatML template.

It is made in a second and loads in less, so tests can start real rings of it. What it says is noise; a request that
wants certain text asks for it with logit_bias.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, START_OF_TURN, END_OF_TURN = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 512
CONTEXT = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('The system message must come first') }}{% endif %}"
    "{% if message['role'] == 'system' and not message['content'] %}"
    "{{ raise_exception('The system message must say something') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog while the ring passes hidden states from rank to rank.",
    "A token that was sampled on the last rank travels back to the first, and the next step begins.",
    "user assistant system tool developer question answer hello world one two three four five",
]


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Writes tokenizer.json and tokenizer_config.json, and returns the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START_OF_TURN, eos_token=END_OF_TURN, pad_token=END_OF_TURN
    )
    fast.add_special_tokens({"additional_special_tokens": [END_OF_TEXT]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def write_tiny_chat_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Writes the whole folder; `changes` go into config.json. Another `seed` is another model."""
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        **changes,
    }
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
