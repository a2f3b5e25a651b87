"""`python -m api`: the process that owns the HTTP port and keeps the ring running.

It takes the lock of its project folder and binds its port before anything is started, so a mistake costs no model load;
then HTTP server and supervisor run side by side until SIGTERM or ctrl-C. `launch.sh start` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from api import reload
from api.ports import check_port
from api.runtime_files import API_FILE, AlreadyRunning, only_server_of, write_json
from config import ConfigError, Settings, load_config
from config.combinations import warnings
from config.load import export_passthrough
from config.logging import setup_api_logging
from config.settings import PROCESS_FIELDS
from distributed.launch import instance_id, run_dir
from distributed.memory import share_one_heap

logger = logging.getLogger("api")

ROOT_VARIABLE = "MLX_RING_ROOT"  # another project folder: its .env, .run, models and server.log; for tests
EXIT_CRASH = 1
EXIT_CONFIG = 2
EXIT_RUNNING = 3
EXIT_PORT = 4
HTTP_END_GRACE_S = 2  # for the last words of requests that SHUTDOWN_GRACE_S was not enough for
SILENCE_S = 5.0  # once the server stops: in which a client must take something of its answer, or send all it has to


def main() -> int:
    root = Path(os.environ.get(ROOT_VARIABLE) or Path(__file__).parent.parent).resolve()
    parser = argparse.ArgumentParser(prog="python -m api", description="The API process of mlx-ring-server.")
    parser.add_argument("--instance", default=instance_id(root), help="marks the processes of this project folder")
    parser.add_argument("--log-to-stderr", action="store_true", help="besides server.log")
    arguments = parser.parse_args()
    try:
        settings = load_config(root)
    except ConfigError as error:
        return _refuse(str(error), EXIT_CONFIG)
    share_one_heap()
    basis = reload.basis(settings, os.environ)
    export_passthrough(settings)
    setup_api_logging(settings, root / "server.log", to_stderr=arguments.log_to_stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and end are said by this module
    # Tokenizers' own threads would warn about every process that is started; requests run in threads of ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with only_server_of(run_dir(root)), _bound(settings.api_host, settings.api_port) as listener:
            about = {"pid": os.getpid(), "host": settings.api_host, "port": settings.api_port, "basis": basis}
            about |= {"keys": reload.digests(settings, PROCESS_FIELDS), "instance": arguments.instance}
            write_json(run_dir(root) / API_FILE, {**about, "started": time.time()})
            gc.collect()
            gc.freeze()  # what was imported stays: the collector, for which all streams wait, need not look at it again
            asyncio.run(_serve(settings, arguments.instance, listener))
    except AlreadyRunning as error:
        return _refuse(str(error), EXIT_RUNNING)
    except PortInUse as error:
        return _refuse(str(error), EXIT_PORT)
    except Exception:  # the outermost frame of the process
        logger.critical("the api process ends", exc_info=True)
        return EXIT_CRASH
    return 0


class PortInUse(Exception):
    """API_PORT cannot be bound."""


def _refuse(message: str, exit_code: int) -> int:
    """The start ends here; `message` says why, in the log (if there is one already) and to whoever started it."""
    logger.critical("%s", message)
    print(message, file=sys.stderr)
    return exit_code


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """The HTTP socket, bound but not listening yet. Raises PortInUse."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise PortInUse(f"API_HOST={host}: no such host ({error.strerror})") from error
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            check_port(str(address[0]), port)
            listener.bind(address)
        except OSError as error:
            raise PortInUse(
                f"port {port} on {host} cannot be used ({error.strerror}): end what uses it, or set API_PORT to a free "
                "port in .env"
            ) from error
        yield listener


class _HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are this module's: uvicorn would close the port at once, and requests still drain."""
        yield


async def _serve(settings: Settings, instance: str, listener: socket.socket) -> None:
    # Only here, so that a wrong setting or a taken port is said in an instant.
    from api.app import create_app
    from api.connections import KEEP_ALIVE_S, Connections, raise_file_limit
    from api.engine_client import EngineClient
    from api.supervisor import Supervisor

    engine = EngineClient(
        settings.for_ranks(),
        max_queued_requests=settings.max_queued_requests,
        request_timeout_s=settings.request_timeout,
        max_concurrent_per_key=settings.max_concurrent_requests_per_key,
        max_queued_per_key=settings.max_queued_requests_per_key,
    )
    supervisor = Supervisor(settings, engine, instance)
    connections = Connections.for_open_files(raise_file_limit(), silence_s=settings.request_timeout)
    http = _HttpServer(
        uvicorn.Config(
            create_app(settings, engine, supervisor),
            http=connections.accept,  # pyright: ignore[reportArgumentType]  # it only ever calls the class
            timeout_keep_alive=KEEP_ALIVE_S,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
        )
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        supervisor.hurry = stop.is_set()  # the second one waits for no request,
        http.force_exit = http.should_exit  # nor for clients that take their answers slowly
        stop.set()

    def on_reload() -> None:
        folder = run_dir(settings.project_root)
        asked = reload.read_asked(folder, settings)
        if asked is not None and supervisor.reload(*asked):
            reload.confirm(folder)

    for warning in warnings(settings):
        logger.warning("%s", warning)
    loop.add_signal_handler(reload.ASK, on_reload)
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(signal_number, on_signal)
    logger.info("serving http://%s:%d, model %s", settings.api_host, settings.api_port, settings.model_name)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(http.serve(sockets=[listener]), name="http")
        ring = tasks.create_task(supervisor.run(), name="supervisor")
        await stop.wait()
        await supervisor.stop()
        ring.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ring
        connections.hurry(http.server_state.connections, SILENCE_S)  # pyright: ignore[reportArgumentType]  # its only class
        http.config.timeout_graceful_shutdown = max(HTTP_END_GRACE_S, math.ceil(supervisor.seconds_of_grace))
        http.should_exit = True
    logger.info("stopped")


if __name__ == "__main__":
    sys.exit(main())
