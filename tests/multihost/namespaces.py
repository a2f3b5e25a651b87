"""Several hosts on one Linux machine: network namespaces on a bridge, with an address, a home folder and an sshd each.

This machine is the first host. Names and addresses are drawn anew, so test runs side by side do not meet. The hosts
share everything with this machine but the network, their home folders, and one folder that only this machine sees.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    address: str
    home: Path
    link: str  # this machine's end of the cable; `cut` pulls it, `mend` plugs it in
    namespace: str

    @contextmanager
    def running(self, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process there, for as long as the block lasts."""
        process = subprocess.Popen([str(_tool("ip")), "netns", "exec", self.namespace, *argv], stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def cut(self) -> None:
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        _ip("link", "set", self.link, "up")


@dataclass(frozen=True)
class Hosts:
    own_address: str
    others: list[Host]
    ssh_config: Path
    hidden: Path  # a folder whose content the other hosts do not see

    @property
    def settings(self) -> dict[str, str]:
        """The .env keys that make these hosts a ring."""
        return {
            "WORKER_HOSTS": ",".join(host.address for host in self.others),
            "SSH_OPTIONS": f"-F '{self.ssh_config}'",
        }


def why_not() -> str | None:
    """What this machine lacks to make hosts, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("ip", "sshd", "ssh", "ssh-keygen") if _tool(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    name = f"mr{secrets.token_hex(3)}"
    if _try_ip("netns", "add", name) and _try_ip("link", "add", name, "type", "bridge"):
        _try_ip("link", "del", name)
        _try_ip("netns", "del", name)
        return None
    _try_ip("netns", "del", name)
    return "does not allow network namespaces"


@contextmanager
def make_hosts(folder: Path, count: int) -> Iterator[Hosts]:
    """`count` hosts besides this one; all is taken away at the end. `folder` holds keys and the home folders."""
    mark = f"mr{secrets.token_hex(3)}"
    subnet = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}"
    for key in ("key", "hostkey"):
        subprocess.run([str(_tool("ssh-keygen")), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    Path("/run/sshd").mkdir(parents=True, exist_ok=True)
    others = [Host(f"{subnet}.{n}", folder / f"home {n}", f"{mark}v{n}", f"{mark}n{n}") for n in range(2, count + 2)]
    hidden = folder / "only here"
    hidden.mkdir()
    servers: list[subprocess.Popen[bytes]] = []
    try:
        _ip("link", "add", mark, "type", "bridge")
        _ip("addr", "add", f"{subnet}.1/24", "dev", mark)
        _ip("link", "set", mark, "up")
        for n, host in enumerate(others, start=2):
            host.home.mkdir()
            _add_namespace(host, mark, f"{mark}e{n}")
            servers.append(_start_sshd(host, folder, hidden))
        ssh_config = folder / "ssh config"
        ssh_config.write_text(
            f'Host {subnet}.*\n  IdentityFile "{folder / "key"}"\n  IdentitiesOnly yes\n'
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        hosts = Hosts(f"{subnet}.1", others, ssh_config, hidden)
        for host in others:
            _wait_for_sshd(hosts, host)
        yield hosts
    finally:
        for server in servers:
            server.terminate()
            server.wait()
        for host in others:
            _try_ip("link", "del", host.link)
            _try_ip("netns", "del", host.namespace)
        _try_ip("link", "del", mark)


def _add_namespace(host: Host, bridge: str, inner: str) -> None:
    _ip("netns", "add", host.namespace)
    _ip("link", "add", host.link, "type", "veth", "peer", "name", inner)
    _ip("link", "set", host.link, "master", bridge, "up")
    _ip("link", "set", inner, "netns", host.namespace)
    _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", inner)
    _ip("-n", host.namespace, "link", "set", inner, "up")
    _ip("-n", host.namespace, "link", "set", "lo", "up")


def _start_sshd(host: Host, folder: Path, hidden: Path) -> subprocess.Popen[bytes]:
    options = {
        "ListenAddress": f"{host.address}:22",
        "HostKey": f'"{folder / "hostkey"}"',
        "AuthorizedKeysFile": f'"{folder / "key.pub"}"',
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "MaxStartups": "100",
        "SetEnv": f'"HOME={host.home}"',
    }
    sshd = [str(_tool("sshd")), "-D", "-f", "/dev/null"]
    for name, value in options.items():
        sshd += ["-o", f"{name}={value}"]
    # `ip netns exec` gives the command mounts of its own, so this hides the folder there and nowhere else.
    script = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(sshd)}"
    argv = [str(_tool("ip")), "netns", "exec", host.namespace, "/bin/sh", "-c", script]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_for_sshd(hosts: Hosts, host: Host) -> None:
    argv = [str(_tool("ssh")), "-F", str(hosts.ssh_config), "-o", "BatchMode=yes", host.address, "true"]
    for _ in range(50):
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"sshd on {host.address}: {done.stderr.decode()}")


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _ip(*arguments: str) -> None:
    subprocess.run([str(_tool("ip")), *arguments], check=True, capture_output=True)


def _try_ip(*arguments: str) -> bool:
    with suppress(subprocess.CalledProcessError):
        _ip(*arguments)
        return True
    return False
