"""Which stage needs a tensor, told from its name alone.

Decoder layers are the longest numbered list (of "layers", if one is) that is not a vision, audio or drafting part; the
rest is sorted into embeddings, head and final norm, and, where a name says nothing, whatever both ends may need. It
must never be trusted with what a stage evaluates: the cut decides that, and evaluating a tensor that was not fetched is
an error; this decides what is downloaded and counted. `model_files` calls it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from distributed.partition import LayerRange

EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings", "embeddings", "embedding", "embed_in"}
EMBEDDINGS |= {"embed", "token_embeddings"}
HEADS = {"lm_head", "output", "embed_out", "ff_out", "head", "output_layer"}
FINAL_NORMS = {"norm", "norm_f", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "ln_out", "output_norm"}
FINAL_NORMS |= {"embedding_norm"}  # lfm2 calls its last norm so
LAYER_LISTS = {"layers", "h", "blocks"}
FOREIGN = ("vision", "visual", "audio", "speech", "image", "mtp", "multi_modal", "mm_")

# Their middle layers take arguments that are computed from token ids with weights outside the layers.
MIDDLE_STAGES_NEED_MORE = {"gemma3n", "gemma4", "gemma4_text", "gemma4_unified", "talkie"}


@dataclass(frozen=True)
class WeightNames:
    """The order behind one model's tensor names."""

    layers_prefix: str  # "model.layers": the number follows it
    num_layers: int
    tied: bool  # the head is the embeddings' matrix
    middle_needs_more: bool

    @classmethod
    def of(cls, names: Collection[str], *, num_layers: int | None, tied: bool, model_type: str) -> WeightNames:
        """Reads the order from all names of a model. `num_layers` comes from its config, where that has it."""
        lists: dict[str, set[int]] = defaultdict(set)
        for name in names:
            prefix, index = _split_at_number(name)
            if index is not None and not _is_foreign(prefix):
                lists[prefix].add(index)

        def likeness(prefix: str) -> tuple[bool, int]:
            return prefix.rpartition(".")[2] in LAYER_LISTS, len(lists[prefix])

        layers_prefix = max(lists, key=likeness, default="")
        has_head = any(_module(name) in HEADS for name in names)
        return cls(
            layers_prefix=layers_prefix,
            num_layers=num_layers if num_layers is not None else len(lists.get(layers_prefix, ())),
            tied=tied or not has_head,
            middle_needs_more=model_type in MIDDLE_STAGES_NEED_MORE,
        )

    def layer_of(self, name: str) -> int | None:
        """The decoder layer a tensor belongs to. Layers past the last are drafting layers, which mlx-lm drops."""
        prefix, index = _split_at_number(name)
        return index if prefix == self.layers_prefix else None

    def is_embedding(self, name: str) -> bool:
        """True for the matrix that has a row for each token."""
        outside_lists = _split_at_number(name)[1] is None and not _is_foreign(name)
        return outside_lists and _module(name) in EMBEDDINGS - {"wpe"} and name.endswith(".weight")

    def is_needed(self, name: str, layer_range: LayerRange | None, *, is_first: bool, is_last: bool) -> bool:
        """True if the stage may evaluate this tensor. `layer_range` None asks for what is outside the layers."""
        layer = self.layer_of(name)
        if layer is not None:
            return layer_range is not None and layer in layer_range
        if _is_foreign(name):
            return False
        if _split_at_number(name)[1] is not None:
            return True  # another numbered list: which layers use it, the name does not say
        module = _module(name)
        if module in HEADS or module in FINAL_NORMS:
            return is_last
        if self.middle_needs_more:
            return True
        if module in EMBEDDINGS:
            return is_first or (is_last and self.tied)
        return is_first or is_last


def _split_at_number(name: str) -> tuple[str, int | None]:
    """ "model.layers.3.mlp.experts.7.w1.weight" -> ("model.layers", 3)."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:position]), int(part)
    return name, None


def _is_foreign(name: str) -> bool:
    return any(part.startswith(FOREIGN) for part in name.split("."))


def _module(name: str) -> str:
    """The module that owns the tensor: "model.norm.weight" -> "norm"."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else parts[0]
