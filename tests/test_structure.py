"""The architecture's rules about imports, read from the code: who may import whom, and what never imports mlx."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.settings import RING_FIELDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("config", "distributed", "server", "api")
MAY_IMPORT = {
    "config": {"config"},
    "distributed": {"config", "distributed"},
    "server": {"config", "distributed", "server"},
    "api": {"config", "distributed", "server", "api"},
}
WITHOUT_MLX = [
    "server.scheduler",
    "server.sequence",
    "server.protocol",
    "server.frame",
    "server.kv_budget",
    "server.grammar",
    "distributed.partition",
    "distributed.hosts",
    "distributed.launch",
    "distributed.workers",
    "distributed.model_files",
    "distributed.builtin_model",
    "distributed.memory",
    "distributed.placement",
    "distributed.layer_times",
    "distributed.frames",
    "distributed.control",
    "api.schemas.chat",
    "api.output.deltas",
    "api.structured.grammar",
    "api.cli.__main__",
]


def imports_of(path: Path) -> set[str]:
    """Dotted names of the modules of ours that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module}
    return {name for name in found if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str):
    for path in (ROOT / package).rglob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


def test_the_api_knows_of_the_server_only_its_protocol():
    for path in (ROOT / "api").rglob("*.py"):
        of_server = {name for name in imports_of(path) if name.split(".")[0] == "server"}
        assert of_server <= {"server.protocol"}, f"{path.relative_to(ROOT)} imports {of_server}"


def test_no_part_of_the_api_but_the_ring_s_keepers_reads_what_a_new_ring_changes():
    """The others would go on with what was true when the process began."""
    for path in (ROOT / "api").rglob("*.py"):
        if path.parent.name != "cli" and not path.name.startswith(("supervisor", "ring_", "reload")):
            read = set(re.findall(r"settings\.(\w+)", path.read_text())) & RING_FIELDS
            assert not read, f"{path.relative_to(ROOT)} reads {read}"


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_what_only_decides_never_imports_mlx(module: str):
    program = f"import sys, {module}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
