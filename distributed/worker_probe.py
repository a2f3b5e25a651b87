"""What a worker host says about itself, and a test of one link of the ring; run there before anything of ours is there.

So it is one file with nothing but the standard library: distributed.workers sends it as text to a worker's Python over
ssh. It changes nothing on the machine. `main` takes WORKER_DIR and a JSON object as arguments and prints a JSON object.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROUND_TRIPS = 5
LINK_PAYLOAD_S = 0.3  # how long a link is loaded to see what it carries
CONTROL_TIMEOUT_S = 3.0
SAMPLES = 32  # pieces of a file, at even distances
SAMPLE_BYTES = 4096


def facts(folder: Path, package_names: list[str], model_paths: list[str]) -> dict[str, Any]:
    """Versions, our code's hash, disk, memory (bytes), and for each of `model_paths` what `files_of` says of it.

    A relative model path is meant from `folder`; one that is not there has no files.
    """
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in package_names},
        "code": _code_hash(folder),
        "free_bytes": shutil.disk_usage(_existing_parent(folder)).free,
        "memory_bytes": total_memory(),
        "has_openblas": _has_openblas(),
        "models": {path: files_of(folder / Path(path).expanduser()) for path in model_paths},
    }


def files_of(folder: Path) -> dict[str, list[Any]]:
    """For the relative path of every file under `folder`: its size in bytes, and a digest of samples of it.

    Two trainings of a model have files of the same sizes. They differ everywhere, so samples tell them apart, which
    takes milliseconds a file, where reading it all would take as long as a start.
    """
    if not folder.is_dir():
        return {}
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _sampled(path)] for path in found}


def _sampled(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            last = max(0, os.fstat(file.fileno()).st_size - SAMPLE_BYTES)
            for number in range(SAMPLES):
                file.seek(last * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        return str(error.strerror)  # like no file that can be read
    return digest.hexdigest()[:16]


def total_memory() -> int:
    """The machine's memory in bytes."""
    if platform.system() == "Darwin":
        shown = subprocess.run(["/usr/sbin/sysctl", "-n", "hw.memsize"], capture_output=True, text=True, check=True)
        return int(shown.stdout)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _has_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code_hash(folder: Path) -> str | None:
    """What the code in `folder` says of itself; None where there is none that can."""
    code = "from distributed.version import code_hash; print(code_hash())"
    try:
        shown = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return shown.stdout.strip() or None


def _existing_parent(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


# -- one link of the ring --------------------------------------------------------------------------------------------


def link(
    listen: tuple[str, int], connect: tuple[str, int], previous_token: str, own_token: str, timeout_s: float
) -> dict[str, Any]:
    """Be one rank of the ring for a moment: accept the rank before at `listen`, connect to the next one at `connect`.

    Returns either `error` ("listen", "connect", "control" or "accept") with `reason`, or `latency_ms` and `bytes_per_s`
    towards the next rank. Each connector says its token, so that a stranger on the port is told apart, and then calls
    at a port that the system chose as well, as control connections do: a firewall may let in the ring port alone.
    """
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(tuple(listen))
        server.listen()
    except OSError as error:
        server.close()
        return {"error": "listen", "reason": "in use" if error.errno == errno.EADDRINUSE else str(error.strerror)}
    deadline = time.monotonic() + timeout_s
    accepted: dict[str, str] = {}
    acceptor = threading.Thread(target=_accept, args=(server, previous_token, deadline, accepted), daemon=True)
    acceptor.start()
    result = _connect((connect[0], connect[1]), own_token, deadline)
    acceptor.join(max(0.0, deadline - time.monotonic()) + 1)
    server.close()
    return result if "error" in result or not accepted else result | accepted


def _accept(server: socket.socket, token: str, deadline: float, failed: dict[str, str]) -> None:
    while True:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
            with connection, socket.create_server((server.getsockname()[0], 0)) as control:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if connection.recv(len(token)).decode(errors="replace") != token:
                    continue
                connection.sendall(b"!%05d" % control.getsockname()[1])
                for _ in range(ROUND_TRIPS):
                    connection.sendall(connection.recv(1))
                received = 0
                while piece := connection.recv(1 << 20):
                    received += len(piece)
                # The connector closed first, so no TIME_WAIT of ours keeps the ring port from the ring.
                connection.sendall(received.to_bytes(8, "big"))
                return
        except TimeoutError:
            failed.update(error="accept", reason="the rank before did not connect")
            return
        except OSError as error:
            failed.update(error="accept", reason=str(error.strerror or error))
            return


def _connect(address: tuple[str, int], token: str, deadline: float) -> dict[str, Any]:
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(0.01, min(3.0, deadline - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() + 0.1 >= deadline:
                return {"error": "connect", "reason": str(error.strerror or error)}
            time.sleep(0.1)  # the next rank does not listen yet
    try:
        with connection:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token.encode())
            answer = connection.recv(6)
            if not answer.startswith(b"!"):
                return {"error": "connect", "reason": "something else answers on that port"}
            if reason := _why_no_connection((address[0], int(answer[1:]))):
                return {"error": "control", "reason": reason}
            latency_s = min(_round_trip(connection) for _ in range(ROUND_TRIPS))
            started, piece = time.monotonic(), bytes(1 << 18)
            while time.monotonic() - started < LINK_PAYLOAD_S:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            received = int.from_bytes(connection.recv(8), "big")
            return {"latency_ms": latency_s * 1e3, "bytes_per_s": received / (time.monotonic() - started)}
    except OSError as error:
        return {"error": "connect", "reason": str(error.strerror or error)}


def _why_no_connection(address: tuple[str, int]) -> str:
    try:
        socket.create_connection(address, timeout=CONTROL_TIMEOUT_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _round_trip(connection: socket.socket) -> float:
    started = time.monotonic()
    connection.sendall(b"?")
    connection.recv(1)
    return time.monotonic() - started


def main() -> None:
    folder, question = Path(sys.argv[1]), json.loads(sys.argv[2])
    if question.pop("ask") == "link":
        answer = link(**question)
    else:
        answer = facts(folder, question["package_names"], question["model_paths"])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
