"""One rank of the ring: `python -m server --instance ID --socket PATH [--api-pid PID]`, started by mlx.launch on every
machine.

The order matters. stdin goes first (mlx.launch spins a core for as long as it may write there), OpenBLAS before mlx,
the ring before anything heavy (a neighbour waits 31 s for it), and every way out is `os._exit` (`distributed.fatal`).
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import signal
import socket
import sys

from distributed.blas import prefer_openblas
from distributed.memory import share_one_heap
from distributed.temporary import use_private_temporary_folder

logger = logging.getLogger("server")

# How long a thread of Python waits for one that computes. With the usual 5 ms a frame that is done would wait for its
# sender while the next step's graph is being built.
_SWITCH_INTERVAL_S = 0.0005
# MLX waits for its neighbours without an end, in C++ that lets no thread of Python run: a stranger's call at a ring
# port, or a neighbour that never comes, would keep this process for ever. The first heartbeat takes the alarm over.
_FORM_TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m server", description=__doc__)
    parser.add_argument("--instance", required=True, help="marks this process as the server's, for ./launch.sh stop")
    parser.add_argument("--socket", required=True, help="the api process's unix socket; used by rank 0")
    parser.add_argument("--api-pid", type=int, help="the api process, where it is on this machine: ends with it")
    arguments = parser.parse_args()

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole process group; the api ends us in order
    rank = int(os.environ.get("MLX_RANK", "0"))

    share_one_heap()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)

    from config.logging import setup_rank_logging

    setup_rank_logging("INFO", rank, 0, "")
    use_private_temporary_folder()
    prefer_openblas(int(os.environ.get("MLX_RING_LOCAL_RANKS", "1")))
    _serve(rank, arguments.socket, arguments.api_pid)


def _serve(rank: int, socket_path: str, api_pid: int | None) -> None:
    from distributed.fatal import die_of, end_with, flush_and_exit, introduce
    from distributed.ring import Ring

    introduce(f"rank {rank} ({socket.gethostname()})")
    if api_pid is not None:
        end_with(api_pid, "the api process")
    try:
        from server.api_link import ApiLink

        api = ApiLink(socket_path) if rank == 0 else None
        configured = api.configure() if api is not None else {}
        logger.info("joins the ring, which must be formed within %.0f s", _FORM_TIMEOUT_S)
        faulthandler.dump_traceback_later(_FORM_TIMEOUT_S, exit=True)
        ring = Ring.join()
        from config.logging import setup_rank_logging

        setup_rank_logging("INFO", ring.rank, ring.size, str(configured.get("model_name", "")))
        from server.startup import start_rank

        start_rank(ring, api, configured)
    except SystemExit as end:
        flush_and_exit(int(end.code or 0))
    except Exception as error:  # the outermost frame of the process
        die_of(error)


if __name__ == "__main__":
    sys.exit(main())
