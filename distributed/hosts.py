"""Who takes part in the ring: from WORKER_HOSTS, RING_HOST, HOSTFILE or RING_SIZE to one `RankHost` a rank.

It resolves names and finds this machine's address, and never starts or changes anything on another machine. Called by
distributed.launch, which writes mlx.launch's hostfile from it, by distributed.workers and by the command line.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.errors import HostError
from distributed.ssh import find_ssh, ssh_options

if TYPE_CHECKING:
    from config import Settings

LOCAL_NAMES: tuple[str, ...] = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class RankHost:
    """One rank's place: the machine it runs on and where it listens on the ring."""

    rank: int
    ssh: str | None  # what ssh is given to reach the machine; None: this machine
    addresses: tuple[str, ...]  # IPv4, as its neighbours reach it; several only from a HOSTFILE
    ports: tuple[int, ...]  # one an address

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def is_local(self) -> bool:
        return self.ssh is None

    @property
    def name(self) -> str:
        """For messages."""
        return self.ssh or "this machine"


def ring_hosts(settings: Settings) -> list[RankHost]:
    """All ranks in ring order; rank 0 is always this machine. HostError names the host or key that does not work."""
    if settings.hostfile:
        places = _places_of_hostfile(_hostfile_path(settings))
    elif settings.worker_hosts:
        places = _places_of_workers(settings)
    else:
        places = [(None, ("127.0.0.1",))] * settings.ring_size
    hosts: list[RankHost] = []
    port = settings.ring_port
    for rank, (target, addresses) in enumerate(places):
        # mlx.launch counts ports on over all ranks and addresses, so ranks that share a machine never share a port.
        hosts.append(RankHost(rank, target, addresses, tuple(range(port, port + len(addresses)))))
        port += len(addresses)
    return hosts


def worker_targets(hosts: Sequence[RankHost]) -> list[str]:
    """The other machines, each once, in ring order."""
    return list(dict.fromkeys(host.ssh for host in hosts if host.ssh is not None))


def ssh_targets(settings: Settings) -> list[str]:
    """The other machines as ssh is given them, each once. Unlike `ring_hosts` it looks up no name of WORKER_HOSTS."""
    if settings.hostfile:
        return worker_targets(ring_hosts(settings))
    return list(dict.fromkeys(name for name in settings.worker_hosts if name not in LOCAL_NAMES))


def hostfile_envs(settings: Settings) -> list[str]:
    """The NAME=value lines that a HOSTFILE asks to set on every rank."""
    if not settings.hostfile:
        return []
    data = _read_hostfile(_hostfile_path(settings))
    return [str(line) for line in data.get("envs", [])] if isinstance(data, dict) else []


# -- WORKER_HOSTS ----------------------------------------------------------------------------------------------------


def _places_of_workers(settings: Settings) -> list[tuple[str | None, tuple[str, ...]]]:
    addresses = [None if name in LOCAL_NAMES else resolve_worker(settings, name) for name in settings.worker_hosts]
    _check_names_differ(settings.worker_hosts, addresses)
    first = next((address for address in addresses if address is not None), None)
    if settings.ring_host:
        ring_host = _resolve(settings.ring_host, f"RING_HOST={settings.ring_host}")
        if first is not None and not is_own_address(ring_host):
            raise HostError(
                f"RING_HOST={settings.ring_host}: no interface of this machine has the address {ring_host}; give one"
                " that the workers reach, or leave RING_HOST empty to have it found"
            )
    else:
        ring_host = "127.0.0.1" if first is None else own_address_towards(first)
    places: list[tuple[str | None, tuple[str, ...]]] = [(None, (ring_host,))]
    for name, address in zip(settings.worker_hosts, addresses, strict=True):
        places.append((None, (ring_host,)) if address is None else (name, (address,)))
    return places


def _check_names_differ(names: Sequence[str], addresses: Sequence[str | None]) -> None:
    """By its name is known what shares a machine: its memory, and the folder that `workers` fills."""
    name_of: dict[str, str] = {}
    for name, address in zip(names, addresses, strict=True):
        if address is not None and name_of.setdefault(address, name) != name:
            raise HostError(
                f"WORKER_HOSTS: {name_of[address]} and {name} are one machine ({address}): remove one, or write the"
                " same name twice for two ranks there"
            )


def resolve_worker(settings: Settings, target: str) -> str:
    """The IPv4 address of an ssh target, `user@` and the HostName of ssh's configuration respected."""
    if target.startswith("-"):
        raise HostError(f"WORKER_HOSTS: {target!r} is an option of ssh, not a host; options belong in SSH_OPTIONS")
    shown = subprocess.run(
        [find_ssh(), *ssh_options(settings), "-G", target], capture_output=True, text=True, check=False
    )
    if shown.returncode != 0:
        raise HostError(f"WORKER_HOSTS: ssh does not understand {target!r}: {shown.stderr.strip()}")
    pairs = (line.partition(" ") for line in shown.stdout.splitlines())
    hostname = next((value for key, _, value in pairs if key == "hostname"), target.rpartition("@")[2])
    address = _resolve(hostname, f"WORKER_HOSTS: {target}")
    if is_own_address(address):
        raise HostError(
            f"WORKER_HOSTS: {target} is this machine ({address}), which is rank 0 and not listed; remove it, or write"
            " 127.0.0.1 for a second rank here"
        )
    return address


def own_address_towards(address: str) -> str:
    """This machine's address on the way to `address`: connecting a UDP socket picks the route and sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise HostError(
                f"no route from this machine to {address} ({error.strerror}); check the network, or set RING_HOST"
            ) from error
        return probe.getsockname()[0]


def is_own_address(address: str) -> bool:
    """Whether an interface of this machine has `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _resolve(hostname: str, where: str) -> str:
    try:
        found = socket.getaddrinfo(hostname, None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        if ":" in hostname:
            raise HostError(
                f"{where}: the ring takes names and IPv4 addresses alone, neither IPv6 nor a port after a colon; ssh's"
                " port belongs in ~/.ssh/config or SSH_OPTIONS"
            ) from error
        raise HostError(
            f"{where}: {hostname!r} has no IPv4 address that this machine can find ({error.strerror}); correct the"
            " name, write the address itself, or list addresses in a HOSTFILE"
        ) from error
    return str(found[0][4][0])


# -- HOSTFILE --------------------------------------------------------------------------------------------------------


def _hostfile_path(settings: Settings) -> Path:
    return settings.project_root / Path(settings.hostfile).expanduser()


def _read_hostfile(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise HostError(f"HOSTFILE={path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise HostError(f"HOSTFILE={path}: is not JSON ({error})") from error


def _places_of_hostfile(path: Path) -> list[tuple[str | None, tuple[str, ...]]]:
    """Rank 0 is this machine whatever name the file gives it, and so is every entry of the same name."""
    data = _read_hostfile(path)
    backend = data.get("backend", "") if isinstance(data, dict) else ""
    if backend not in ("", "ring"):
        raise HostError(f'HOSTFILE={path}: backend {backend!r} is not supported; remove it or write "ring"')
    entries = data.get("hosts") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        raise HostError(f'HOSTFILE={path}: must be a list of {{"ssh": …, "ips": […]}}, one entry a rank')
    places: list[tuple[str | None, tuple[str, ...]]] = []
    local_names = set(LOCAL_NAMES)
    for rank, entry in enumerate(entries):
        name, ips = (entry.get("ssh"), entry.get("ips")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or name.startswith("-") or not isinstance(ips, list) or not ips:
            raise HostError(f'HOSTFILE={path}: entry {rank} must have "ssh" (a host) and "ips" (at least one address)')
        if rank == 0:
            local_names.add(name)
        addresses = tuple(_resolve(str(ip), f"HOSTFILE={path}: entry {rank}") for ip in ips)
        places.append((None if name in local_names else name, addresses))
    strange = next((ip for ip in places[0][1] if not is_own_address(ip)), None)
    if strange is not None:
        raise HostError(
            f"HOSTFILE={path}: the first entry is rank 0 and must be this machine, and none of its interfaces has"
            f" {strange}"
        )
    return places
