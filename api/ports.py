"""Whether a TCP port is free to listen on, and who has it if not. Used before the api and before the ring listen.

It binds nothing for good.
"""

from __future__ import annotations

import socket
import sys

import psutil


def check_port(address: str, port: int) -> None:
    """Raises OSError where something listens on `port` of `address`, or of all addresses."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # With SO_REUSEADDR, which connections of a server that has just ended require, BSD's and macOS's bind looks for the
    # very same address alone: there a listener on all addresses is found only by asking for all of them too.
    everywhere = [] if sys.platform.startswith("linux") else ["::" if family == socket.AF_INET6 else "0.0.0.0"]
    for asked in [address, *everywhere]:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((asked, port))


def holder(port: int) -> str:
    """Who listens on `port`, to follow the system's word for the failure: ": process 4711, python"; "" if unknown."""
    try:
        connections = psutil.net_connections("tcp")
        pid = next(c.pid for c in connections if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN)
        return f": process {pid}, {psutil.Process(pid).name()}" if pid else ""
    except (psutil.Error, StopIteration):  # macOS shows other processes' ports to root alone
        return ""
