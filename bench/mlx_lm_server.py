"""`mlx_lm.server` with the same OpenBLAS as our ranks have; mlx's own on Linux would make it 12 times slower.

Arguments are its own. `bench.contestants` starts it, alone or twice under mlx.launch.
"""

from __future__ import annotations

import os

from distributed.blas import prefer_openblas


def main() -> None:
    prefer_openblas(2 if "MLX_RANK" in os.environ else 1)
    from mlx_lm import server

    server.main()


if __name__ == "__main__":
    main()
