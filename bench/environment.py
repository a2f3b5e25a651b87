"""What every table begins with: the versions and the machine it was measured on."""

from __future__ import annotations

import os
import platform
import sys
from datetime import date

from distributed.version import versions


def heading(title: str) -> str:
    """Markdown lines that say what was measured, when, on what, and with which command."""
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    command = (
        f"python -m {os.path.relpath(sys.argv[0]).removesuffix('.py').replace(os.sep, '.')} {' '.join(sys.argv[1:])}"
    )
    return f"### {title}\n\n{date.today()}; {machine}; {named}\n`{command.strip()}`\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
