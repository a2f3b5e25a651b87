"""A ring over three hosts, and the cables of two of them, which `bench.faults` cuts.

The hosts are those of `tests.multihost`: network namespaces with an address and an sshd each, so it needs root. The
server is started by launch.sh, as on real machines.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.kinds import Fault, unplugged
from tests.launched_project import LaunchedProject, link_environment
from tests.multihost.namespaces import make_hosts

WORKER_FOLDER = "ring"


@dataclass(frozen=True)
class Links:
    server: LaunchedProject
    faults: list[Fault]  # one a cable


@contextlib.contextmanager
def links(scratch: Path, model: Path, **keys: object) -> Iterator[Links]:
    """The server runs; `keys` are settings of it. `tests.multihost.namespaces.why_not` says whether that can be."""
    folder = scratch / "hosts"
    folder.mkdir()
    with make_hosts(folder, 2) as hosts:
        project = LaunchedProject(
            scratch / "linked",
            WORKER_HOSTS=",".join(host.address for host in hosts.others),
            SSH_OPTIONS=f"\"-F '{hosts.ssh_config}'\"",
            WORKER_DIR=f"~/{WORKER_FOLDER}",
            MODEL_REPO=f'"{model}"',
            **keys,
        )
        for host in hosts.others:
            shutil.rmtree(host.home / WORKER_FOLDER, ignore_errors=True)
            link_environment(host.home / WORKER_FOLDER)
        try:
            for command in ("workers", "start"):
                done = project.launch(command)
                if done.returncode:
                    raise RuntimeError(f"./launch.sh {command}: {done.stdout}")
            faults = [unplugged(host, f"rank {rank}") for rank, host in enumerate(hosts.others, 1)]
            yield Links(project, faults)
        finally:
            project.launch("stop")
            project.end()
