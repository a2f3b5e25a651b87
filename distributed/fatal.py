"""The one way a rank ends when something is wrong: log it, flush, `os._exit`.

A rank must never try to unwind: `sys.exit` with a pending ring recv hangs until the peer dies, and MLX cannot re-join a
group, so the ring is over as soon as one rank is. Every thread of a rank runs under `fatal_on_error`; the supervisor in
the api process starts the ring again.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from distributed.errors import RingError

P = ParamSpec("P")
EXIT_RING_LOST = 13

logger = logging.getLogger(__name__)
_ending = threading.Lock()


def die(reason: str, *, exit_code: int = EXIT_RING_LOST, exc_info: bool = False) -> NoReturn:
    """End this process now, with `reason` as the last line of its log. The first caller wins; others wait for the
    end.
    """
    _ending.acquire()
    log = logger.critical if exit_code else logger.info
    log("rank ends: %s", reason, exc_info=exc_info)
    flush_and_exit(exit_code)


def flush_and_exit(exit_code: int) -> NoReturn:
    """Flush the log and end without unwinding."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def fatal_on_error(function: Callable[P, None]) -> Callable[P, None]:
    """Wrap a thread's target so that an exception in it ends the process through `die`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except RingError as error:  # a neighbour is gone: no bug of ours, and the message says it all
            die(str(error))
        except Exception as error:  # the outermost frame of a thread
            die(f"{type(error).__name__} in {threading.current_thread().name}: {error}", exc_info=True)

    return run


def start_thread(name: str, target: Callable[..., None], *args: object) -> threading.Thread:
    """Start a daemon thread that ends the process when it fails."""
    thread = threading.Thread(target=fatal_on_error(target), args=args, name=name, daemon=True)
    thread.start()
    return thread
