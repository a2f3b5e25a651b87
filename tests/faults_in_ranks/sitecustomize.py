"""Puts a fault into a rank, when a test says so: Python imports this first in every process that has it on PYTHONPATH.

Nothing of the server knows of it. `tests.faulty_ranks` makes the environment that says what is to happen and where; all
processes but that rank go on as if it were not there.
"""

import importlib.util
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

LOADER = "distributed.shard.load"


def wedge() -> None:
    """The compute thread is stuck for ever; the others run."""
    threading.Event().wait()


def hold_the_lock() -> None:
    """No thread of Python runs any more: a search that takes longer than the world exists lets none of them."""
    re.match("(a+)+$", "a" * 64 + "b")


def take_memory() -> None:
    bytearray(1 << 60)


class AfterLoading:
    """Finds the module that loads stages as Python does, and changes what it gives."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self._fault = fault

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != LOADER:
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec: Any = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_change(module: Any) -> None:
            run(module)
            load_stage = module.load_stage
            module.load_stage = lambda *args, **options: self._with_fault(load_stage(*args, **options))

        spec.loader.exec_module = run_and_change
        return spec

    def _with_fault(self, stage: Any) -> Any:
        fault = self._fault

        def call(stage: Any, token_ids: Any, *args: Any) -> Any:
            if _is_asked_for(Path(fault["trigger"])):
                print(f"the fault happens: {fault['kind']}", file=sys.stderr, flush=True)
                globals()[fault["kind"]]()
            return type(stage).__mro__[1].__call__(stage, token_ids, *args)

        stage.__class__ = type("FaultyStage", (type(stage),), {"__call__": call})
        return stage


def _is_asked_for(trigger: Path) -> bool:
    """Whether the file is there; it is not there any more afterwards."""
    try:
        trigger.unlink()
    except FileNotFoundError:
        return False
    return True


if "MLX_RING_TEST_FAULT" in os.environ and sys.orig_argv[1:3] == ["-m", "server"]:
    told = json.loads(os.environ["MLX_RING_TEST_FAULT"])
    if int(os.environ.get("MLX_RANK", "0")) == told["rank"]:
        sys.meta_path.insert(0, AfterLoading(told))  # pyright: ignore[reportArgumentType]
