"""The command that starts the ring: mlx.launch with the right addresses, python, folder and environment on every host.

`ring_command` only writes files under .run and returns what to start; it starts nothing itself. The api's supervisor
runs the command, keeps its stdin open, and writes one newline there when the ring is ready (DESIGN 9c).
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distributed.errors import RingError
from distributed.hosts import RankHost, hostfile_envs, ring_hosts, worker_targets
from distributed.ssh import quote_remote_path, write_ssh_shim

if TYPE_CHECKING:
    from config import Settings

# Names that are not ours and pass through to the ranks on other machines as well.
_FOREIGN_PREFIXES = ("HF_", "MLX_")
_FOREIGN_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
# mlx.launch and we set these for each rank; a value inherited from a shell is a left-over of another ring.
_RANK_NAMES = ("MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_RING_LOCAL_RANKS", "MLX_METAL_FAST_SYNCH")


@dataclass(frozen=True)
class RingCommand:
    """What to run (`argv`, with exactly the environment `env`), and the ranks it starts.

    `temporary` has to be there before, and may go when all of it has ended: mlx.launch leaves files there.
    """

    argv: list[str]
    env: dict[str, str]
    ranks: list[RankHost]
    temporary: Path


def instance_id(root: Path) -> str:
    """Marks the processes of the server in `root` (`--instance ID`), so that `stop` finds them by command line."""
    return hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]


def run_dir(root: Path) -> Path:
    """Where a running server keeps its state; ignored by git."""
    return root / ".run"


def ring_command(
    settings: Settings, *, root: Path, socket_path: str, instance: str, hosts: Sequence[RankHost] | None = None
) -> RingCommand:
    """The mlx.launch call for all ranks of `settings` (of `hosts` where the caller has found them already).

    Rank 0 connects to the unix socket `socket_path`, beside which the launcher's temporary folder is. The ranks here
    end when this process does. HostError as in `ring_hosts`, RingError without mlx.launch.
    """
    hosts = list(hosts or ring_hosts(settings))
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        raise RingError(f"{launcher} is missing: start the server with ./launch.sh, which makes the environment")
    run_dir(root).mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in _RANK_NAMES}
    env["PYTHONUNBUFFERED"] = "1"
    temporary = Path(socket_path).with_name("temporary")
    env["TMPDIR"] = str(temporary)
    if worker_targets(hosts):
        shim = write_ssh_shim(settings, run_dir(root) / "ssh-shim")
        env["PATH"] = f"{shim}{os.pathsep}{env.get('PATH', os.defpath)}"
    argv = [sys.executable, str(launcher), "--backend", "ring", "--starting-port", str(settings.ring_port)]
    argv += ["--hostfile", str(_write_hostfile(run_dir(root) / "hostfile.json", hosts))]
    for line in [*_environment_of_ranks(env), *hostfile_envs(settings)]:
        argv += ["--env", line]
    program = _program(settings, hosts, root, f"--instance {instance} --socket {shlex.quote(socket_path)}")
    return RingCommand([*argv, "--", "/bin/sh", "-c", program], env, hosts, temporary)


def _write_hostfile(path: Path, hosts: Sequence[RankHost]) -> Path:
    entries = [{"ssh": host.ssh or "127.0.0.1", "ips": list(host.addresses)} for host in hosts]
    content = json.dumps(entries, indent=1) + "\n"
    if not path.exists() or path.read_text() != content:  # the same ring comes again where the disk is full by now
        path.write_text(content)
    return path


def _environment_of_ranks(env: Mapping[str, str]) -> list[str]:
    """NAME=value for every rank. mlx.launch puts them on command lines, which any user of the machine can read, so
    what may be a secret stays here: a worker's own `hf auth login` serves it there."""
    # A value inherited from one login shell wedged clusters of Macs, so it is set on every rank.
    lines = ["MLX_METAL_FAST_SYNCH=0", "PYTHONUNBUFFERED=1"]
    for name, value in sorted(env.items()):
        foreign = name.startswith(_FOREIGN_PREFIXES) or name.upper() in _FOREIGN_NAMES
        secret = "TOKEN" in name or "@" in value
        if foreign and not secret:
            lines.append(f"{name}={value}")
    return lines


def _program(settings: Settings, hosts: Sequence[RankHost], root: Path, arguments: str) -> str:
    """The shell text every rank runs. mlx.launch gives all ranks the same one, so it looks at MLX_RANK itself.

    stdin comes from /dev/null so that mlx.launch can stop watching it; `exec` keeps one process a rank. The ranks here
    get the temporary folder back that mlx.launch's files are kept out of.
    """
    ranks_of_machine = Counter(host.ssh for host in hosts)
    cases: list[str] = []
    for target, count in ranks_of_machine.items():
        ranks = "|".join(str(host.rank) for host in hosts if host.ssh == target)
        if target is None:
            folder, python = shlex.quote(str(root)), shlex.quote(sys.executable)
            folder += f" && export TMPDIR={shlex.quote(tempfile.gettempdir())}"
            of_machine = f" --api-pid {os.getpid()}"
        else:
            folder, python, of_machine = quote_remote_path(settings.worker_dir), ".venv/bin/python", ""
        start = f"cd {folder} && export MLX_RING_LOCAL_RANKS={count}"
        start += f" && exec {python} -m server {arguments}{of_machine} </dev/null"
        cases.append(f"{ranks}) {start} ;;")
    return f"case $MLX_RANK in {' '.join(cases)} esac"
