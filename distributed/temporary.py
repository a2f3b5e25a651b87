"""A temporary folder that is this user's alone, for a rank and the libraries in it.

MLX's CPU backend compiles kernels into its temporary folder and loads what it finds there by name: in a folder that
others may write to, they could leave code for it. Every rank calls this before it imports mlx.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def use_private_temporary_folder() -> None:
    """Point TMPDIR at a folder within the present one. It stays, so that kernels are compiled once."""
    folder = Path(tempfile.gettempdir()) / f"mlx-ring-server-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="mlx-ring-server-"))  # somebody was here before us
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # asked for again
