"""One line that says what is going on: rewritten in place on a terminal, one line a change elsewhere."""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    def __init__(self, said: str = "") -> None:
        """`said`: what was printed last; it is not said again."""
        self._last = said
        self._began = time.monotonic()
        self._terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        if self._terminal:
            width = (shutil.get_terminal_size().columns or 80) - 1  # a pseudo-terminal may say 0
            line = f"{text} ({time.monotonic() - self._began:.0f} s)"
            print(f"\r\x1b[K{line[:width]}", end="", flush=True)
        elif text != self._last:
            print(text, flush=True)
        self._last = text

    def end(self) -> None:
        """Free the line for whatever is printed next."""
        if self._terminal and self._last:
            print("\r\x1b[K", end="", flush=True)
        self._last = ""
