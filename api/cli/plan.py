"""`plan`: what would run where, whether it fits, and how evenly a step would be shared.

It reads the headers of the model's files, the times that an earlier start measured, and asks the machines for their
memory; it loads no model and starts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from api.cli.health import format_bytes, table
from api.cli.progress import Progress
from config import Settings, load_config
from config.load import export_passthrough
from distributed.hosts import RankHost, ring_hosts
from distributed.layer_times import recall, times_file
from distributed.memory import MACOS_SHARE, available_memory_bytes, configured_limit_bytes
from distributed.model_files import inspect_model, prepare_model
from distributed.placement import StagePlan, imbalance, plan_stages, shares
from distributed.workers import ask_facts


def plan(root: Path) -> int:
    settings = load_config(root)
    export_passthrough(settings)
    hosts = ring_hosts(settings)
    progress = Progress()
    info = inspect_model(prepare_model(settings.model_repo, root, progress=progress.show))
    progress.end()
    limits = [limit for _, limit in sorted(_memory_limits(settings, hosts).items())]
    kv_bytes = settings.kv_cache_reserved_memory_mb * 2**20
    times = recall(times_file(root), info.config_hash, info.num_layers, [host.address for host in hosts])
    stages = plan_stages(info, len(hosts), limits, kv_bytes, settings.layer_split, times)
    rows = [("rank", "host", "layers", "of a step", "weights", "KV cache at most", "tokens in it", "may use", "")]
    for stage, host, share in zip(stages, hosts, shares(stages)):
        rows.append(
            (
                str(stage.rank),
                f"{host.name} ({host.address}:{host.ports[0]})",
                str(stage.layer_range),
                f"{share:.0%}",
                format_bytes(stage.weight_bytes),
                format_bytes(stage.kv_reserved_bytes),
                f"{stage.kv_tokens:,}" if stage.kv_tokens else "any number",
                format_bytes(stage.memory_limit or 0),
                "fits" if stage.fits else "DOES NOT FIT",
            )
        )
    total = format_bytes(sum(file.total_bytes for file in info.weight_files))
    print(f"{settings.model_name}: {info.model_type}, {info.num_layers} layers, {total} of weights, {len(hosts)} ranks")
    print("\n".join(table(rows)))
    if len(stages) > 1:
        print(_balance(stages, is_timed=times is not None))
    if all(stage.fits for stage in stages):
        return 0
    print(
        "it does not fit: lower KV_CACHE_RESERVED_MEMORY_MB, add a machine to WORKER_HOSTS, raise RANK_MEMORY_LIMIT_MB"
        " if it is set, or choose a smaller MODEL_REPO"
    )
    return 1


def _balance(stages: Sequence[StagePlan], *, is_timed: bool) -> str:
    slowest, total = max(stage.step_cost for stage in stages), sum(stage.step_cost for stage in stages)
    known = "by the bytes each rank reads in a step: nothing is measured yet"
    if is_timed:
        known = f"by measured times: {slowest * 1e3:.1f} ms of {total * 1e3:.1f} ms a step"
    return f"balance: the slowest rank takes {imbalance(stages):.2f} times the mean ({known})"


def _memory_limits(settings: Settings, hosts: list[RankHost]) -> dict[int, int]:
    """What each rank may hold, bytes: its share of its machine, under RANK_MEMORY_LIMIT_MB."""
    ranks_of_machine = Counter(host.ssh for host in hosts)
    machine_bytes: dict[str | None, int] = {}
    for target in ranks_of_machine:
        if target is None:
            machine_bytes[target] = available_memory_bytes()
        else:
            facts = ask_facts(settings, target, None)
            machine_bytes[target] = int(facts["memory_bytes"] * (MACOS_SHARE if facts["system"] == "Darwin" else 1))
    limits: dict[int, int] = {}
    for host in hosts:
        share = machine_bytes[host.ssh] // ranks_of_machine[host.ssh]
        cap = configured_limit_bytes(host.rank, settings.rank_memory_limit_mb)
        limits[host.rank] = share if cap is None else min(share, cap)
    return limits
