"""mlx_lm's BatchGenerator as a process of its own, for `bench.throughput`: one JSON line in, one out.

In: {"prompts": [[ids…]…], "max_tokens": n}. Out: {"seconds": s, "tokens": n}. It waits for work without using the
processor, so that it does not disturb the others' turns.
"""

from __future__ import annotations

import json
import sys
import time

from distributed.blas import prefer_openblas


def main(folder: str) -> None:
    prefer_openblas()
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator

    model = load(folder)[0]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        prompts = work["prompts"]
        generator = BatchGenerator(
            model,
            max_tokens=work["max_tokens"],
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        started = time.perf_counter()
        generator.insert(prompts)
        left = len(prompts)
        tokens = 0
        while left:
            for response in generator.next_generated():
                tokens += 1
                left -= response.finish_reason is not None
        mx.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), flush=True)
        generator.close()


if __name__ == "__main__":
    main(sys.argv[1])
