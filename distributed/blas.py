"""Makes MLX's CPU backend usable on Linux: loads OpenBLAS before MLX.

The Linux wheel of MLX ships the slow reference BLAS; with OpenBLAS loaded first its symbols win and float32 prefill is
12 times faster (measured). Macs use Metal and Accelerate and need none of this. Must run before mlx is imported.
"""

from __future__ import annotations

import ctypes
import os
import sys

OPENBLAS = "libopenblas.so.0"
# Idle BLAS threads spin for 2^this processor cycles before they sleep. The default of 26 is 20 ms and more, most of a
# step, during which they take the cores from the next rank's stage on the same machine.
SHORT_SPIN = "4"


def prefer_openblas(local_ranks: int = 1) -> bool:
    """Load OpenBLAS for this process, which shares the machine with `local_ranks` - 1 others.

    Every rank may use all cores. Where that makes ranks slow each other down with several frames in flight, the
    measured step times show it and the scheduler lets one of them compute at a time (docs/performance.md, "Threads").

    Returns False where there is none to load (then MLX's own BLAS serves) or none is needed.
    """
    if not sys.platform.startswith("linux"):
        return False
    if local_ranks > 1:
        os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", SHORT_SPIN)
    try:
        ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
