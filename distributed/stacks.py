"""What all threads of this process are doing, as a short text for the log.

Names of threads and one line a frame, small enough to reach server.log in one piece: mlx.launch mixes the ranks' lines
where they are long. It cannot see threads of C++, and nothing at all while one of them holds Python's lock; for that
case the heartbeat keeps faulthandler ready. Called by `distributed.pipeline`.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

_MAX_FRAMES = 12  # of a thread, the innermost


def stacks_of_all_threads() -> str:
    """One paragraph a thread: its name, then its frames, innermost last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    running = sys._current_frames()
    return "\n".join(
        f"{names.get(ident, f'thread {ident}')}:\n{_frames(frame)}"
        for ident, frame in sorted(running.items(), key=lambda item: names.get(item[0], ""))
    )


def _frames(frame: FrameType | None) -> str:
    lines: list[str] = []
    while frame is not None and len(lines) < _MAX_FRAMES:
        path = Path(frame.f_code.co_filename)
        lines.append(f"  {'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return "\n".join(reversed(lines))
