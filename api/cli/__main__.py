"""Reads the command line, runs one command, and turns our errors into one message and an exit code.

launch.sh is the caller. Exit codes: 0 done, 1 failed (the reason is on stderr), 2 wrong usage, 3 `status` of a server
that does not run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from api.cli import logs, plan, restart, start, status, stop, workers
from config import ConfigError, with_origins
from distributed.errors import DistributedError

ROOT = Path(__file__).resolve().parent.parent.parent


def main(arguments: list[str] | None = None) -> int:
    commands: dict[str, Callable[[Path], int]] = {
        "start": start.start,
        "stop": stop.stop,
        "restart": restart.restart,
        "status": status.status,
        "plan": plan.plan,
        "workers": workers.workers,
    }
    parser = argparse.ArgumentParser(prog="launch.sh")
    choices = parser.add_subparsers(dest="command", required=True)
    for name in commands:
        choices.add_parser(name)
    follow = choices.add_parser("logs")
    follow.add_argument("-n", type=int, default=50, metavar="LINES", help="how many lines to begin with")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "logs":
            return logs.follow(ROOT, parsed.n)
        return commands[parsed.command](ROOT)
    except (ConfigError, DistributedError) as error:
        print(with_origins(str(error), ROOT), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads on (`launch.sh status | head`); Python would complain at exit
        return 1


if __name__ == "__main__":
    sys.exit(main())
