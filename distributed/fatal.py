"""The one way a rank ends when something is wrong: tell the others, log it, flush, `os._exit`.

A rank must never try to unwind: `sys.exit` with a pending ring recv hangs until the peer dies, and MLX cannot re-join a
group, so the ring is over as soon as one rank is. It must never hang on its way out either, whatever does not take its
words. Every thread of a rank runs under `fatal_on_error`; the supervisor in the api process starts the ring again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import psutil

from distributed.errors import HandshakeError, RingError
from distributed.frames import LastWords
from distributed.memory import is_allocation_failure

P = ParamSpec("P")
EXIT_RING_LOST = 13
_END_WITHIN_S = 3.0  # from the decision to end; a full pipe or a lock that somebody holds may be in the way

_LOOK_S = 0.5  # between two looks at a process that is not our child

Listener = Callable[[LastWords], None]  # is told why this process ends; does its best, and is quick

logger = logging.getLogger(__name__)
_ending = threading.Lock()
_listeners: list[Listener] = []
_name = "a rank"


def introduce(name: str) -> None:
    """How this process is called in what it tells others at its end: "rank 2 (mac3.local)"."""
    global _name
    _name = name


def tell_at_the_end(listener: Listener) -> None:
    """Have `listener` called before this process ends through `die`."""
    _listeners.append(listener)


def die(
    reason: str,
    *,
    exit_code: int = EXIT_RING_LOST,
    exc_info: bool = False,
    permanent: bool = False,
    out_of_memory: bool = False,
) -> NoReturn:
    """End this process now, with `reason` as the last line of its log; see `LastWords` for what else can be told."""
    _begin_to_end(LastWords(f"{_name}: {reason}", permanent, out_of_memory))
    log = logger.critical if exit_code else logger.info
    log("rank ends: %s", reason, exc_info=exc_info)
    flush_and_exit(exit_code)


def die_of_hearing(words: LastWords) -> NoReturn:
    """End this process because another rank has ended, and say so in its words."""
    _begin_to_end(words)
    logger.critical("rank ends, as does %s", words.reason)
    flush_and_exit(EXIT_RING_LOST)


def _begin_to_end(words: LastWords) -> None:
    """The first caller goes on; others wait here for the end. The log, which may block, comes after the others."""
    _ending.acquire()
    _end_at_last()
    for listener in _listeners:
        with contextlib.suppress(Exception):  # nothing that goes wrong here matters any more
            listener(words)


def flush_and_exit(exit_code: int) -> NoReturn:
    """Flush the log and end without unwinding."""
    _end_at_last()
    for stream in (*logging.getLogger().handlers, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # mlx.launch, which reads them, may have gone
            stream.flush()
    os._exit(exit_code)


def fatal_on_error(function: Callable[P, None]) -> Callable[P, None]:
    """Wrap a thread's target so that an exception in it ends the process through `die`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:  # the outermost frame of a thread
            die_of(error)

    return run


def die_of(error: Exception) -> NoReturn:
    """End this process because of `error`; called where it is being handled."""
    if isinstance(error, RingError):  # a neighbour is gone: no bug of ours, and the message says it all
        die(str(error), permanent=isinstance(error, HandshakeError))
    # What explains a failed allocation is raised from it.
    out_of_memory = any(cause is not None and is_allocation_failure(cause) for cause in (error, error.__cause__))
    reason = f"{type(error).__name__} in {threading.current_thread().name}: {error}"
    die(reason, exc_info=True, out_of_memory=out_of_memory)


def start_thread(name: str, target: Callable[..., None], *args: object) -> threading.Thread:
    """Start a daemon thread that ends the process when it fails."""
    thread = threading.Thread(target=fatal_on_error(target), args=args, name=name, daemon=True)
    thread.start()
    return thread


def end_with(pid: int, name: str) -> None:
    """Have this process end when the process `pid` of this machine does, whatever the other ranks are able to say."""

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # One that nobody has waited for has ended as well, which psutil's own `wait` does not see.
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(_LOOK_S)
        die(f"{name} is gone", exit_code=0)

    start_thread(f"watches {name}", watch)


def _end_at_last() -> None:
    """The kernel ends this process soon, whatever blocks it until then."""
    if not any(signal.getitimer(signal.ITIMER_REAL)):
        signal.setitimer(signal.ITIMER_REAL, _END_WITHIN_S)  # SIGALRM is not handled, so no thread of ours has to run
