"""Loads one stage: mlx-lm builds the whole model lazily, the cut keeps its layers, and only those are read.

Weight files of other stages need not be on this machine: files of holes with the same header stand in for them, so
that mlx-lm's own loading (sanitize, quantization, strict names) runs unchanged. It must never let such a hole become a
weight: once the model is built the stand-ins are emptied, and reading one is an error. Each rank calls `load_stage`.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.nn as nn
from mlx_lm.utils import load_model

from distributed.errors import DistributedError, ModelError
from distributed.memory import is_allocation_failure
from distributed.model_files import ModelInfo, WeightFile
from distributed.partition import LayerRange
from distributed.shard.stage_model import StageModel


def load_stage(info: ModelInfo, layer_range: LayerRange, *, trust_remote_code: bool = False) -> StageModel:
    """The stage with its weights in memory. `ensure_weights` has brought the files it needs.

    Raises:
        ModelError: mlx-lm cannot load the model, or a weight that the stage needs is not on this machine.
    """
    stage = StageModel(load_lazily(info, trust_remote_code=trust_remote_code), layer_range)
    if stage.num_layers != info.num_layers:  # the split would leave some out, and no rank would be the last
        raise ModelError(
            f"{info.path}/config.json says that the model has {info.num_layers} layers, but mlx-lm makes "
            f"{stage.num_layers} of it: correct the number of layers there."
        )
    with _as_model_errors(info, "read"):
        stage.load_weights_of_this_stage()
    return stage


def load_lazily(info: ModelInfo, *, trust_remote_code: bool = False) -> nn.Module:
    """The whole model with nothing of it read. A weight whose file is not here raises when it is evaluated.

    Raises:
        ModelError: mlx-lm cannot load the model.
    """
    with _folder_for_mlx_lm(info) as folder, _as_model_errors(info, "load"):
        model, _ = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    return model


@contextlib.contextmanager
def _folder_for_mlx_lm(info: ModelInfo) -> Iterator[Path]:
    """A folder in which all weight files are there and have names that mlx-lm looks for."""
    if all(info.has_file(file) and file.name.startswith("model") for file in info.weight_files):
        yield info.path
        return
    with tempfile.TemporaryDirectory(prefix="mlx-ring-model-") as temporary:
        folder = Path(temporary)
        weights = {file.name for file in info.weight_files}
        for path in info.path.absolute().iterdir():
            if path.name not in weights and path.suffix != ".safetensors":
                (folder / path.name).symlink_to(path)
        stand_ins: list[Path] = []
        for file in info.weight_files:
            name = file.name if file.name.startswith("model") else f"model-{file.name}"
            name = name.replace("/", "-")
            if info.has_file(file):
                (folder / name).symlink_to(info.path.absolute() / file.name)
            else:
                write_stand_in(folder / name, file)
                stand_ins.append(folder / name)
        yield folder
        for path in stand_ins:  # MLX keeps them open: what was zeros until now becomes an error
            os.truncate(path, 0)


def write_stand_in(path: Path, file: WeightFile) -> None:
    """Writes a safetensors file with `file`'s header and holes for data: its size, but hardly a byte on disk."""
    header = json.dumps(file.tensors).encode()
    data_bytes = max((tensor["data_offsets"][1] for tensor in file.tensors.values()), default=0)
    with path.open("wb") as stand_in:
        stand_in.write(struct.pack("<Q", len(header)) + header)
        stand_in.truncate(8 + len(header) + data_bytes)


@contextlib.contextmanager
def _as_model_errors(info: ModelInfo, doing: str) -> Iterator[None]:
    """What mlx-lm and MLX raise on a model they cannot use, as ours."""
    try:
        yield
    except DistributedError:
        raise
    # SystemExit: mlx_lm.models.olmo ends the interpreter where its package is missing.
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, OSError, SystemExit) as error:
        if is_allocation_failure(error):  # nothing is wrong with the model
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"mlx-lm cannot {doing} the model in {info.path} (model_type {info.model_type}): {reason}"
        ) from error
