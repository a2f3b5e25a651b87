"""A model's files: finding or fetching them, and reading what they hold without loading any of it.

`prepare_model` turns MODEL_REPO into a folder, `inspect_model` reads its config and the headers of its weight files,
and `ensure_weights` downloads only the files that hold a stage's weights. It never imports mlx, and unpickles nothing.
The api process, the CLI and every rank call it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import hub, model_config
from distributed.builtin_model import FOLDERS, prepare_builtin, resolve_form
from distributed.errors import ModelError
from distributed.partition import LayerRange
from distributed.weight_names import WeightNames

BROUGHT = ".mlx-ring-server"  # in a folder on a worker that `./launch.sh workers` filled, and may replace parts of
INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: `tensors` is its header, name -> {"dtype", "shape", "data_offsets"}."""

    name: str
    tensors: dict[str, dict[str, Any]] = field(repr=False)

    def size_bytes(self, name: str) -> int:
        start, end = self.tensors[name]["data_offsets"]
        return end - start

    @property
    def total_bytes(self) -> int:
        return sum(map(self.size_bytes, self.tensors))


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before anything of it is loaded. Sizes are bytes as stored in its files."""

    path: Path
    repo: str
    model_type: str
    num_layers: int
    config_hash: str
    layer_bytes: tuple[int, ...]
    first_stage_bytes: int  # embeddings
    last_stage_bytes: int  # final norm, head, embeddings if tied
    shared_bytes: int  # in both of the above; held once where one stage is both
    middle_stage_bytes: int  # what every stage in between needs besides its layers: nothing, for most architectures
    max_context: int | None  # tokens
    vocab_size: int
    kv_bytes_per_token_layer: int  # an estimate
    weight_files: tuple[WeightFile, ...] = field(repr=False)
    names: WeightNames = field(repr=False)

    def stage_bytes(self, layer_range: LayerRange) -> int:
        """Weights that the stage with these layers holds."""
        is_first, is_last = layer_range.start == 0, layer_range.end == self.num_layers
        layers = sum(self.layer_bytes[layer_range.start : layer_range.end])
        return layers + self.bytes_besides_layers(is_first=is_first, is_last=is_last)

    def bytes_besides_layers(self, *, is_first: bool, is_last: bool) -> int:
        """Weights that a stage holds whichever layers it has."""
        if is_first and is_last:
            return self.first_stage_bytes + self.last_stage_bytes - self.shared_bytes
        if is_first or is_last:
            return self.first_stage_bytes if is_first else self.last_stage_bytes
        return self.middle_stage_bytes

    def has_file(self, file: WeightFile) -> bool:
        """True if the file is on this machine."""
        return (self.path / file.name).is_file()

    def files_of_stage(self, layer_range: LayerRange, *, is_first: bool, is_last: bool) -> list[WeightFile]:
        """The weight files that hold something this stage may evaluate."""

        def needed(file: WeightFile) -> bool:
            return any(
                self.names.is_needed(name, layer_range, is_first=is_first, is_last=is_last) for name in file.tensors
            )

        return [file for file in self.weight_files if needed(file)]


def models_dir(root: Path) -> Path:
    """Where models of this installation are kept; ignored by git."""
    return root / "models"


def prepare_model(repo: str, root: Path, *, progress: Progress = lambda message: None) -> Path:
    """The folder of the model that MODEL_REPO names, complete except for the weights of a hub repository.

    `repo` is "builtin" (or one of its forms), a folder, the name of a folder that was brought to `models_dir(root)`, or
    a Hugging Face repository. Progress messages are for people.

    Raises:
        ModelError: there is no such model, it is damaged, or mlx-lm does not know its architecture.
    """
    if resolve_form(repo) in FOLDERS:
        return prepare_builtin(repo, models_dir(root), progress)
    given = Path(repo).expanduser()
    brought = models_dir(root) / given.name
    places = [given if given.is_absolute() else root / given, given.absolute(), brought]
    if (root / BROUGHT).exists():  # a copy at the same place as on rank 0's machine is nobody's to bring up to date
        places.insert(0, brought)
    for folder in places:
        if folder.is_dir():
            inspect_model(folder)
            return folder
    if repo.startswith((os.sep, "~", ".")):
        is_file = "it is a file, not a folder" if given.exists() else "there is no such folder"
        raise ModelError(
            f"MODEL_REPO={repo}: {is_file}. Give a folder with config.json and safetensors weights, a Hugging Face "
            "repository, or builtin; on a worker ./launch.sh workers brings the folder."
        )
    folder = hub.fetch_metadata(repo, progress)
    model_config.load_config(folder)
    return folder


def inspect_model(path: Path) -> ModelInfo:
    """Sizes and names of a model's weights, from its config, its index and the headers of its files.

    Headers of files of a hub repository that are not here yet are read over the network, once.

    Raises:
        ModelError: config, index or a weight file is missing or damaged; says which and what to do.
    """
    config = model_config.load_config(path)
    files = _weight_files(path)
    tensors = {name: file.size_bytes(name) for file in files for name in file.tensors}
    names = WeightNames.of(
        tensors,
        num_layers=model_config.num_layers(config),
        tied=model_config.is_tied(config),
        model_type=config["model_type"],
    )
    if not names.num_layers:
        raise ModelError(
            f"{path / 'config.json'} does not say how many layers the model has, nor do its weights' names."
        )

    def outside_layers(*, is_first: bool, is_last: bool) -> set[str]:
        return {name for name in tensors if names.is_needed(name, None, is_first=is_first, is_last=is_last)}

    layer_bytes = [0] * names.num_layers
    for name, size in tensors.items():
        layer = names.layer_of(name)
        if layer is not None and layer < names.num_layers:
            layer_bytes[layer] += size
    first, last = outside_layers(is_first=True, is_last=False), outside_layers(is_first=False, is_last=True)
    middle = outside_layers(is_first=False, is_last=False)
    repository = hub.repository_of(path)
    return ModelInfo(
        path=path,
        repo=repository.repo_id if repository else path.name,
        model_type=config["model_type"],
        num_layers=names.num_layers,
        config_hash=model_config.config_hash(config),
        layer_bytes=tuple(layer_bytes),
        first_stage_bytes=sum(tensors[name] for name in first),
        last_stage_bytes=sum(tensors[name] for name in last),
        shared_bytes=sum(tensors[name] for name in first & last),
        middle_stage_bytes=sum(tensors[name] for name in middle),
        max_context=model_config.max_context(config),
        vocab_size=_vocab_size(config, files, names),
        kv_bytes_per_token_layer=model_config.kv_bytes_per_token_layer(config, value_bytes=_activation_bytes(files)),
        weight_files=files,
        names=names,
    )


def ensure_weights(
    info: ModelInfo,
    layer_range: LayerRange,
    is_first: bool,
    is_last: bool,
    progress: Progress = lambda message: None,
) -> None:
    """Downloads the weight files that hold what the stage needs and are not here. Does nothing for a plain folder.

    Raises:
        ModelError: a file is missing and cannot be fetched.
    """
    wanted = info.files_of_stage(layer_range, is_first=is_first, is_last=is_last)
    missing = [file for file in wanted if not info.has_file(file)]
    if not missing:
        return
    repository = hub.repository_of(info.path)
    if repository is None:
        raise ModelError(f"{info.path} lacks {missing[0].name}: copy or download the model again.")
    hub.download_files(repository, {file.name: file.total_bytes for file in missing}, progress)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's header, without its free-form metadata.

    Raises:
        ModelError: the file is truncated or is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, size_bytes - 8):
                raise ValueError(f"its header of {length} bytes is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if end > size_bytes:
            raise ValueError(f"it ends after {size_bytes} of {end} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError) as error:
        raise ModelError(f"{path} is damaged or truncated ({error}): copy or download it again.") from error
    return header


def _weight_files(path: Path) -> tuple[WeightFile, ...]:
    repository = hub.repository_of(path)
    names = _weight_file_names(path, from_hub=repository is not None)
    here = {name: read_header(path / name) for name in names if (path / name).is_file()}
    absent = [name for name in names if name not in here]
    if absent and repository is None:
        raise ModelError(f"{path} lacks {absent[0]}, which {INDEX} names: copy or download the model again.")
    if absent and repository is not None:
        here |= hub.fetch_headers(repository, path, absent)
    return tuple(WeightFile(name, here[name]) for name in names)


def _weight_file_names(path: Path, *, from_hub: bool) -> list[str]:
    """Names from the index, or, without one, of the files that mlx-lm would load."""
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is damaged ({error!r}): copy or download the model again.") from error
        if not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
            raise ModelError(f"{index} names files that are not safetensors: only .safetensors weights are loaded.")
        return names
    names = sorted(file.name for file in path.glob("model*.safetensors"))
    if names:
        return names
    if from_hub:
        return ["model.safetensors"]
    others = sorted(file.name for file in _files_with(path, (".bin", ".pt", ".pth", ".gguf")))
    found = f" (it has {others[0]}, which is not loaded: pickle files can run code)" if others else ""
    raise ModelError(
        f"{path} has no model*.safetensors{found}: give a folder with safetensors weights, such as one that "
        "`mlx_lm.convert` writes or a repository of mlx-community."
    )


def _files_with(path: Path, suffixes: tuple[str, ...]) -> Iterable[Path]:
    return (file for file in path.iterdir() if file.suffix in suffixes)


def _vocab_size(config: dict[str, Any], files: tuple[WeightFile, ...], names: WeightNames) -> int:
    """Token ids are below it. The embeddings' rows bind too: MLX reads past them without an error."""
    shapes = [tensor["shape"] for file in files for name, tensor in file.tensors.items() if names.is_embedding(name)]
    rows = [shape[0] for shape in shapes if len(shape) == 2]
    sizes = [*rows, model_config.vocab_size(config)]
    known = [size for size in sizes if size]
    if not known:
        raise ModelError("The model's config.json has no vocab_size, and no weight of it looks like embeddings.")
    return min(known)


def _activation_bytes(files: tuple[WeightFile, ...]) -> int | None:
    """Bytes of the floating-point type that most tensors have: activations and cache have it too."""
    counts = dict.fromkeys(_FLOAT_BYTES, 0)
    for file in files:
        for tensor in file.tensors.values():
            if tensor["dtype"] in counts:
                counts[tensor["dtype"]] += 1
    most = max(counts, key=lambda dtype: counts[dtype])
    return _FLOAT_BYTES[most] if counts[most] else None
