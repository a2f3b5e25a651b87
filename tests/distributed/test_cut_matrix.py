"""The parity matrix: every architecture of mlx-lm, cut in every way, against itself in one piece.

docs/models.md shows it as a table, which `python -m tests.distributed.parity_table` makes.
"""

from __future__ import annotations

from pathlib import Path

import mlx_lm.models
import pytest

from tests.distributed.cut_runs import parity
from tests.distributed.test_cut import REFUSED
from tests.distributed.tiny_models import NO_TINY_MODEL, TINY, runnable


def test_every_architecture_of_mlx_lm_has_a_tiny_model() -> None:
    folder = Path(next(iter(mlx_lm.models.__path__)))
    architectures = {path.stem for path in folder.glob("*.py") if "class ModelArgs" in path.read_text()}
    assert architectures == TINY.keys() | NO_TINY_MODEL.keys()


@pytest.mark.ring  # needs no ring, but a minute
@pytest.mark.parametrize("architecture", sorted(set(runnable()) - REFUSED))
def test_every_architecture_gives_the_same_logits_cut_and_whole_alone_and_batched(architecture: str) -> None:
    result = parity(architecture)
    assert set(result.differences.values()) == {0}
    assert result.batched is None or result.batched < 1e-3
