"""What would keep a ring from starting, found before anything is started or stopped: ports, machines, model, memory.

It reads and asks, and changes nothing but the model's folder, which it fetches. `start` calls it first, `restart` while
the old server still serves, and `plan` shows what is found.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from api.cli.processes import as_it_listens, find_api, ports_of_ring
from api.cli.progress import Progress
from api.cli.workers import worker_model
from api.ports import check_port, holder
from api.processes import ring_processes
from api.ring_ports import check_ports, local_ports
from config import ConfigError, Settings
from config.load import export_passthrough
from distributed.hosts import RankHost, ring_hosts, worker_targets
from distributed.launch import instance_id
from distributed.layer_times import recall, times_file
from distributed.memory import available_memory_bytes, configured_limit_bytes
from distributed.model_files import ModelInfo, inspect_model, prepare_model
from distributed.placement import StagePlan, check_fits, plan_stages
from distributed.workers import check_workers


@dataclass(frozen=True)
class Checked:
    """What a ring with these settings would consist of."""

    hosts: list[RankHost]
    info: ModelInfo


def check_start(root: Path, settings: Settings, report: Callable[[str], None], *, with_links: bool = True) -> Checked:
    """Everything that can be known before a ring is started. `report`, `with_links` as in `check_workers`.

    Raises ConfigError, and DistributedError of every kind. Memory is refused only where it cannot be enough: how much
    there is in the end each rank finds out itself.
    """
    export_passthrough(settings)
    hosts = ring_hosts(settings)
    check_listening(root, settings, hosts)
    info = read_model(root, settings)
    machine_bytes: dict[str | None, int] = {None: _most_memory_bytes(root)}
    if worker_targets(hosts):
        facts = check_workers(settings, hosts, worker_model(settings, root, info), report, with_links=with_links)
        machine_bytes |= {target: fact["memory_bytes"] for target, fact in facts.items()}
    stages, _ = plan_ring(root, settings, hosts, info, machine_bytes)
    check_fits(stages)
    return Checked(hosts, info)


def check_listening(root: Path, settings: Settings, hosts: Sequence[RankHost]) -> None:
    """Whether the ports are free, but for those that the running server of this folder has.

    Raises ConfigError for API_PORT, RingError for the ring's.
    """
    api = find_api(root, instance_id(root))
    if api is None or as_it_listens(root, api, settings).api_port != settings.api_port:
        check_api_port(settings)
    ours = ports_of_ring(root) if api is not None else set()
    check_ports([(address, port) for address, port in local_ports(hosts) if port not in ours])


def check_api_port(settings: Settings) -> None:
    """Raises ConfigError where the port cannot be listened on; the api checks too, but later and less in the open."""
    try:
        check_port(settings.api_host, settings.api_port)
    except OSError as error:
        raise ConfigError(
            f"API_HOST={settings.api_host}, API_PORT={settings.api_port}: cannot listen there"
            f" ({error.strerror}{holder(settings.api_port)}). Stop that program, or set another API_PORT in .env"
        ) from error


def read_model(root: Path, settings: Settings) -> ModelInfo:
    """Fetch what is lacking of the model, but for a repository's weights, and read its headers. Raises ModelError."""
    progress = Progress()
    try:
        return inspect_model(prepare_model(settings.model_repo, root, progress=progress.show))
    finally:
        progress.end()


def plan_ring(
    root: Path,
    settings: Settings,
    hosts: Sequence[RankHost],
    info: ModelInfo,
    machine_bytes: Mapping[str | None, int],
) -> tuple[tuple[StagePlan, ...], bool]:
    """What each rank would hold, and whether that goes by measured times. `machine_bytes`: what ranks may take there.

    Raises PartitionError as `plan_stages` does.
    """
    ranks_of_machine = Counter(host.ssh for host in hosts)
    limits: list[int] = []
    for host in hosts:
        share = machine_bytes[host.ssh] // ranks_of_machine[host.ssh]
        cap = configured_limit_bytes(host.rank, settings.rank_memory_limit_mb)
        limits.append(share if cap is None else min(share, cap))
    times = recall(times_file(root), info.config_hash, info.num_layers, [host.address for host in hosts])
    kv_bytes = settings.kv_cache_reserved_memory_mb * 2**20
    return plan_stages(info, len(hosts), limits, kv_bytes, settings.layer_split, times), times is not None


def memory_here_bytes(root: Path) -> int:
    """What a ring may take here once the one that runs has ended, by what this process can see of it."""
    return available_memory_bytes(freed_bytes=_resident_bytes(ring_processes(instance_id(root))))


def _most_memory_bytes(root: Path) -> int:
    """A bound that no rank will find exceeded. On a Mac only a rank can ask Metal, and what Metal holds for the running
    ring may be in no process's resident set."""
    return psutil.virtual_memory().total if platform.system() == "Darwin" else memory_here_bytes(root)


def _resident_bytes(processes: Sequence[psutil.Process]) -> int:
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has just ended, and its memory is available already
            continue
    return total
