"""The ring's ports on this machine: taken for as long as the server lives, and never shared in silence.

MLX binds its ports with SO_REUSEPORT, so a second ring on them would start without an error. They are kept across
restarts: no other server of ours slips in between. Taken by the supervisor; the commands look at them before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

from api.ports import check_port, holder
from api.runtime_files import AlreadyRunning, lock_port
from distributed.errors import RingError
from distributed.hosts import RankHost


class RingPorts:
    def __init__(self) -> None:
        self._locks: dict[int, IO[str]] = {}

    @property
    def taken(self) -> list[int]:
        return sorted(self._locks)

    def take(self, hosts: Sequence[RankHost]) -> None:
        """Raises RingError where a ring port of this machine is another server's, or another program's."""
        local = local_ports(hosts)
        for port in self._locks.keys() - {port for _, port in local}:
            self._locks.pop(port).close()
        for _, port in local:
            if port not in self._locks:
                try:
                    self._locks[port] = lock_port(port)
                except AlreadyRunning as error:
                    raise RingError(f"{error}: set RING_PORT to the first of free ports") from error
        check_ports(local)

    def close(self) -> None:
        """They are free for other servers."""
        while self._locks:
            self._locks.popitem()[1].close()


def local_ports(hosts: Sequence[RankHost]) -> list[tuple[str, int]]:
    """Address and port wherever a rank of this machine listens; a ring of one listens nowhere."""
    ranks = [host for host in hosts if host.is_local] if len(hosts) > 1 else []
    return [pair for rank in ranks for pair in zip(rank.addresses, rank.ports, strict=True)]


def check_ports(ports: Sequence[tuple[str, int]]) -> None:
    """Raises RingError where something listens: MLX would share the port with it in silence."""
    for address, port in ports:
        try:
            check_port(address, port)
        except OSError as error:
            raise RingError(
                f"ring port {port} on {address} cannot be used ({error.strerror}{holder(port)}): end what uses it, or "
                "set RING_PORT to the first of free ports"
            ) from error
