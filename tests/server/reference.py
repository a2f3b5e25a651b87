"""mlx_lm's own greedy generation on the unsplit model: `python -m tests.server.reference FOLDER MAX_TOKENS < prompts`.

A third argument, as "8,32", puts mlx_lm's QuantizedKVCache of so many bits and such a group size under it.

Reads a JSON list of prompts (token ids) from stdin and writes the generated ids and their logprobs the same way. A
program of its own, so that OpenBLAS can be loaded before mlx.
"""

import json
import sys

from distributed.blas import prefer_openblas


def main(folder: str, max_tokens: int, quantized: str = "") -> None:
    prefer_openblas()
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

    model, tokenizer = load(folder)[:2]
    answers, logprobs = [], []
    for prompt in json.load(sys.stdin):
        tokens: list[int] = []
        scores: list[float] = []
        cache = make_prompt_cache(model)
        if quantized:
            bits, group_size = map(int, quantized.split(","))
            cache = [QuantizedKVCache(group_size, bits) for _ in cache]
        for token, scored in generate_step(mx.array(prompt), model, max_tokens=max_tokens, prompt_cache=cache):
            tokens.append(int(token))
            scores.append(float(scored[int(token)].item()))  # type: ignore[arg-type]
            if tokens[-1] in tokenizer.eos_token_ids:
                break
        answers.append(tokens)
        logprobs.append(scores)
    stop_token_ids = sorted(tokenizer.eos_token_ids)
    print(json.dumps({"answers": answers, "logprobs": logprobs, "stop_token_ids": stop_token_ids}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
