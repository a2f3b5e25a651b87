"""`plan`: what would run where, whether it fits, and how evenly a step would be shared.

It reads the headers of the model's files, the times that an earlier start measured, and asks the machines for their
memory; it loads no model and starts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from api.cli.checks import check_listening, memory_here_bytes, plan_ring, read_model
from api.cli.health import fetch_health, format_bytes, table
from api.cli.processes import as_it_listens, find_api
from config import ConfigError, Settings, load_config, with_origins
from config.load import export_passthrough
from distributed.errors import RingError
from distributed.hosts import RankHost, ring_hosts, worker_targets
from distributed.launch import instance_id
from distributed.memory import MACOS_SHARE
from distributed.placement import StagePlan, imbalance, shares
from distributed.workers import ask_facts


def plan(root: Path) -> int:
    settings = load_config(root)
    export_passthrough(settings)
    hosts = ring_hosts(settings)
    info = read_model(root, settings)
    stages, is_timed = plan_ring(root, settings, hosts, info, _memory_of_machines(root, settings, hosts))
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
    num_ranks = f"{len(hosts)} rank{'s' if len(hosts) != 1 else ''}"
    print(f"{settings.model_name}: {info.model_type}, {info.num_layers} layers, {total} of weights, {num_ranks}")
    print("\n".join(table(rows)))
    if len(stages) > 1:
        print(_balance(stages, is_timed=is_timed))
    _say_other_cut(root, settings, stages)
    are_ports_free = _say_taken_port(root, settings, hosts)
    if all(stage.fits for stage in stages):
        return 0 if are_ports_free else 1
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


def _say_other_cut(root: Path, settings: Settings, stages: Sequence[StagePlan]) -> None:
    """A first start keeps its cut where measured times would gain little; the next one starts with the best."""
    api = find_api(root, instance_id(root))
    health = fetch_health(as_it_listens(root, api, settings)) if api is not None else None
    now = [f"[{start}, {end})" for start, end in (rank["layers"] for rank in (health or {}).get("ranks") or [])]
    if now and now != [str(stage.layer_range) for stage in stages]:
        print(f"the server that runs has layers {', '.join(now)}: a restart would cut them as above")


def _say_taken_port(root: Path, settings: Settings, hosts: Sequence[RankHost]) -> bool:
    """Whether a start would get its ports; says which one not."""
    try:
        check_listening(root, settings, hosts)
    except (ConfigError, RingError) as error:
        print(with_origins(str(error), root))
        return False
    return True


def _memory_of_machines(root: Path, settings: Settings, hosts: Sequence[RankHost]) -> dict[str | None, int]:
    """What the ranks of each machine may take together, bytes."""
    machine_bytes: dict[str | None, int] = {None: memory_here_bytes(root)}
    for target in worker_targets(hosts):
        facts = ask_facts(settings, target, None)
        machine_bytes[target] = int(facts["memory_bytes"] * (MACOS_SHARE if facts["system"] == "Darwin" else 1))
    return machine_bytes
