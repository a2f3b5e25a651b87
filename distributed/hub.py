"""Models on the Hugging Face Hub: fetching all but the weights, reading weight files' headers, fetching weight files.

All of it goes through huggingface_hub, so its cache, token, endpoint and offline settings (HF_*) apply, and several
processes may work at once. It never decides which files are needed; `model_files` does, and calls it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of its HTTP library)
from tqdm.auto import tqdm

from distributed.errors import ModelError, ModelUnavailable

# What mlx-lm reads besides the weights.
METADATA_PATTERNS = ["*.json", "*.jsonl", "*.jinja", "*.txt", "*.py", "*.model", "*.tiktoken", "LICENSE*"]
_HEADERS_FILE = ".weight_headers.json"  # in the snapshot's folder: a later start needs no network for them
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Repository:
    """One commit of a model repository."""

    repo_id: str
    commit: str


def repository_of(path: Path) -> Repository | None:
    """The repository whose snapshot in the Hub's cache this folder is, or None for any other folder."""
    found = _SNAPSHOT.search(path.as_posix())
    return Repository(f"{found['owner']}/{found['name']}", found["commit"]) if found else None


def fetch_metadata(repo_id: str, progress: Progress) -> Path:
    """Config, tokenizer and index of a repository: the snapshot's folder, without weights.

    Raises:
        ModelError: there is no such repository, or it cannot be reached and is not in the cache.
    """
    progress(f"fetching the configuration and tokenizer of {repo_id}")
    with _translated(repo_id):
        return Path(snapshot_download(repo_id, allow_patterns=METADATA_PATTERNS, tqdm_class=_bar_that_tells(None)))


def fetch_headers(repository: Repository, folder: Path, file_names: list[str]) -> dict[str, dict[str, Any]]:
    """Headers of weight files that are not here: file name -> tensor name -> {"dtype", "shape", "data_offsets"}.

    They are read with range requests, some hundred kilobytes a file, and kept beside the snapshot's files.
    """
    kept = _read_kept(folder / _HEADERS_FILE)
    absent = [name for name in file_names if name not in kept]

    def fetch(file_name: str) -> dict[str, Any]:
        metadata = HfApi().parse_safetensors_file_metadata(
            repository.repo_id, file_name, revision=repository.commit, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        return {
            name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(tensor.data_offsets)}
            for name, tensor in metadata.tensors.items()
        }

    if absent:
        with _translated(repository.repo_id), ThreadPoolExecutor(max_workers=8) as threads:
            kept |= dict(zip(absent, threads.map(fetch, absent), strict=True))
        _keep(folder / _HEADERS_FILE, kept)
    return {name: kept[name] for name in file_names}


def download_files(repository: Repository, sizes: dict[str, int], progress: Progress) -> None:
    """Downloads weight files, named with their sizes in bytes, into the cache; unfinished ones are continued.

    Raises:
        ModelError: the disk has no room for them, or the download fails.
    """
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()), shutil.disk_usage(cache).free
    if needed > free:
        raise ModelError(
            f"The weights of {repository.repo_id} for this rank take {needed / 1e9:.1f} GB, but {cache} has only "
            f"{free / 1e9:.1f} GB free: make room, or set HF_HOME to a larger disk."
        )
    for number, (name, size) in enumerate(sizes.items(), start=1):
        label = f"downloading {name} of {repository.repo_id} (file {number} of {len(sizes)}, {size / 1e9:.2f} GB)"
        progress(label)
        bar = _bar_that_tells(lambda percent, label=label: progress(f"{label}: {percent} %"))
        with _translated(repository.repo_id):
            hf_hub_download(repository.repo_id, name, revision=repository.commit, tqdm_class=bar)


def _bar_that_tells(tell: Callable[[int], None] | None) -> type[tqdm]:
    """A progress bar that draws nothing and reports whole percents."""

    class Bar(tqdm):
        last_told = -1

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface_hub's own bars take it
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere(), "mininterval": 0.5})

        def display(self, *args: Any, **kwargs: Any) -> None:
            percent = int(100 * self.n / self.total) if self.total else 0
            if tell is not None and percent > self.last_told:
                self.last_told = percent
                tell(percent)

    return Bar


class _Nowhere:
    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


@contextlib.contextmanager
def _translated(repo_id: str) -> Iterator[None]:
    """The Hub's errors as ours, each with what to do."""
    is_bare = "/" not in repo_id  # few repositories are called so
    short = " If it is meant as a short name: no CONFIG_FILE that is set lists it." if is_bare else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo_id} is gated: accept its terms on {constants.ENDPOINT}/{repo_id} and set HF_TOKEN to a token that "
            "may read it."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"MODEL_REPO={repo_id} is neither a folder here nor a repository on {constants.ENDPOINT} (a private one "
            f"needs HF_TOKEN): check the name.{short}"
        ) from error
    except (errors.RemoteEntryNotFoundError, errors.NotASafetensorsRepoError) as error:
        raise ModelError(
            f"{repo_id} has no safetensors weights (pickle files such as .bin are not loaded: they can run code): "
            "choose a repository with model.safetensors, such as one of mlx-community."
        ) from error
    except errors.SafetensorsParsingError as error:
        raise ModelError(f"A weight file of {repo_id} is damaged: {error}") from error
    except (errors.LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise ModelUnavailable(
            f"{repo_id} could not be fetched from {constants.ENDPOINT}, and {constants.HF_HUB_CACHE} does not hold "
            f"what is needed ({_first_line(error)}): check the network, or set MODEL_REPO to a folder.{short}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_kept(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _keep(path: Path, headers: dict[str, dict[str, Any]]) -> None:
    """Several ranks may write the same: each renames a whole file into place. A read-only cache is fine."""
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "w") as file:
            json.dump(headers, file)
        os.replace(temporary, path)
