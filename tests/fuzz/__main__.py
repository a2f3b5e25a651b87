"""`python -m tests.fuzz --bodies 10000`: fuzzes a ring of 2 with the tiny chat model and says what came of it."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.bodies import MAX_TOKENS
from tests.fuzz.fuzzing import Fuzzer
from tests.running_server import RunningServer
from tests.tiny_chat_model import write_tiny_chat_model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_chat_model(Path(folder) / "tiny-chat")
        keys = {"MODEL_REPO": str(model), "RING_SIZE": "2", "DEFAULT_MAX_TOKENS": str(MAX_TOKENS)}
        server = RunningServer(Path(folder) / "server", keys)
        server.start()
        fuzzer = Fuzzer(server.url, server.model)
        began = time.monotonic()
        try:
            fuzzer.run(arguments.bodies, arguments.seed)
        finally:
            for name, statuses in fuzzer.statuses.items():
                counted = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
                print(f"{name}: {statuses.total()} bodies: {counted}")
            print(f"{time.monotonic() - began:.0f} s")
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
