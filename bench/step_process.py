"""One process of `bench.cores`: loads a model, says so, and at a word runs decode steps for some seconds.

python -m bench.step_process FOLDER ROWS SECONDS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from distributed.blas import prefer_openblas

WARM_STEPS = 3


def main(folder: Path, num_rows: int, seconds: float) -> None:
    prefer_openblas()
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache
    from mlx_lm.utils import load_model

    model: Any = load_model(folder)[0]
    caches = [BatchKVCache([0] * num_rows) for _ in model.layers]

    def step() -> float:
        began = time.perf_counter()
        mx.eval(model(mx.ones((num_rows, 1), dtype=mx.int32), cache=caches))
        return time.perf_counter() - began

    for _ in range(WARM_STEPS):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    until = time.perf_counter() + seconds
    steps = [step()]
    while time.perf_counter() < until:
        steps.append(step())
    print(median(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
