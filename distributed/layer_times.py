"""How long the layers of a model take on the machines of a ring: what was measured, what follows, and where it is kept.

Each rank has measured only the layers that it held, so the times of the others are estimated: layers of the same size
are of the same kind, and a machine is so much slower than another as it was with the kinds that both had. It never
imports mlx and measures nothing (`shard.measure` does); rank 0 and `plan` read the file, rank 0 alone writes it.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import msgspec

from distributed.launch import run_dir
from distributed.partition import LayerRange

_KEPT = 16  # models and rings that one file remembers, the newest
_ROUNDS = 100  # each halves the error at least, where two machines have a kind in common

logger = logging.getLogger(__name__)


class StageTimes(msgspec.Struct, frozen=True):
    """What one rank measured of a decode step, in seconds; no layers where it could not.

    `others` is what comes before its first and after its last layer: embeddings; norm, head and sampling.
    """

    start: int = 0
    layers: list[float] = []
    others: float = 0.0


class RingTimes(msgspec.Struct, frozen=True):
    """What all ranks of a ring measured of one model. `hosts` are the ranks' addresses: equal ones are one machine."""

    config_hash: str
    hosts: list[str]
    stages: list[StageTimes]

    def is_whole(self, num_layers: int) -> bool:
        """Whether every layer was measured, by one rank each, in ring order."""
        layers = [layer for stage in self.stages for layer, _ in enumerate(stage.layers, stage.start)]
        are_times = all(0 < seconds < math.inf for stage in self.stages for seconds in stage.layers)
        are_times = are_times and all(0 <= stage.others < math.inf for stage in self.stages)
        return are_times and layers == list(range(num_layers)) and len(self.stages) == len(self.hosts)

    def step_costs(self, layer_bytes: Sequence[int]) -> StepCosts:
        """Seconds that each layer takes on each rank, measured or estimated.

        Where a machine never had a kind of layer, it is `slowness` (seconds a byte, of a machine) times `work` (bytes,
        of a kind; corrected by how long it took where it was measured).
        """
        samples: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        for host, stage in zip(self.hosts, self.stages, strict=True):
            for layer, seconds in enumerate(stage.layers, stage.start):
                samples[host, layer_bytes[layer]].append(seconds)
        measured = {cell: median(seconds) for cell, seconds in samples.items()}
        work = {kind: float(max(kind, 1)) for kind in layer_bytes}
        slowness: dict[str, float] = {}
        for _ in range(_ROUNDS):
            for host in {host for host, _ in measured}:
                slowness[host] = mean(t / work[kind] for (other, kind), t in measured.items() if other == host)
            for kind in work:
                work[kind] = mean(t / slowness[host] for (host, other), t in measured.items() if other == kind)
        layers = [[measured.get((host, k), slowness[host] * work[k]) for k in layer_bytes] for host in self.hosts]
        return StepCosts(layers, [stage.others for stage in self.stages])


@dataclass(frozen=True)
class StepCosts:
    """What a decode step costs, in one unit: `layers[rank][layer]`, and `others[rank]` besides the layers."""

    layers: list[list[float]]
    others: list[float]

    def of_stage(self, rank: int, layer_range: LayerRange) -> float:
        return sum(self.layers[rank][layer_range.start : layer_range.end]) + self.others[rank]


def times_file(root: Path) -> Path:
    """Where a project folder remembers measured times. It may be deleted: then they are measured again."""
    return run_dir(root) / "layer-times.json"


def recall(file: Path, config_hash: str, num_layers: int, hosts: Sequence[str]) -> RingTimes | None:
    """The times of this model on this ring, if they were ever measured."""
    for times in _read(file):
        if (times.config_hash, times.hosts) == (config_hash, list(hosts)) and times.is_whole(num_layers):
            return times
    return None


def remember(file: Path, times: RingTimes) -> None:
    """Keep `times` in the place of older ones of the same model and ring. A folder that cannot be written is logged."""
    others = [old for old in _read(file) if (old.config_hash, old.hosts) != (times.config_hash, times.hosts)]
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.encode([times, *others][:_KEPT]) + b"\n")
        draft.replace(file)
    except OSError as error:
        logger.warning("could not keep the measured times of the layers: %s", error)


def _read(file: Path) -> list[RingTimes]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[RingTimes])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("%s is not what this version writes (%s): the layers are measured again", file, error)
        return []
