"""`logs`: follows server.log, also across its rotation. Runs the system's tail, which does just that."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LOG_FILE = "server.log"


def follow(root: Path, lines: int) -> int:
    path = root / LOG_FILE
    if not path.exists():
        print(f"there is no {path} yet: ./launch.sh start makes it", file=sys.stderr)
        return 1
    # -F goes on with the new file when the old one is renamed; GNU's and macOS's tail both have it.
    os.execvp("tail", ["tail", "-n", str(max(0, lines)), "-F", str(path)])
