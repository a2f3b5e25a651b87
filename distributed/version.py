"""What this machine runs: our version and code, mlx's and mlx-lm's versions. All ranks must say the same.

Called by the start-up handshake and by the checks of worker hosts; reads files and package metadata only, no mlx.
"""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

VERSION = "0.1.0"
_PACKAGES = ("config", "distributed", "server")  # what a rank runs


@cache
def code_hash() -> str:
    """Hash of the Python files that a rank runs, so that a worker with yesterday's code is told apart."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions by name. Python's is for the log: only the others must agree."""
    return {
        "mlx-ring-server": f"{VERSION}+{code_hash()}",
        "mlx": metadata.version("mlx"),
        "mlx-lm": metadata.version("mlx-lm"),
        "python": platform.python_version(),
    }


MUST_AGREE = ("mlx-ring-server", "mlx", "mlx-lm")
