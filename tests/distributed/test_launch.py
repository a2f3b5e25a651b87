import errno
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlx._distributed_utils.launch import RemoteProcess

from config import Settings
from distributed.hosts import RankHost
from distributed.launch import RingCommand, instance_id, ring_command

REPORT = """
import json, os, sys
print(json.dumps({"cwd": os.getcwd(), "argv": sys.argv[1:], "here": os.environ["MLX_RING_LOCAL_RANKS"],
                  "stdin": os.readlink("/dev/fd/0") if os.path.islink("/dev/fd/0") else "/dev/null"}))
"""
HOSTS = [
    RankHost(0, None, ("10.0.0.1",), (4000,)),
    RankHost(1, "me@mac2", ("10.0.0.2",), (4001,)),
    RankHost(2, None, ("10.0.0.1",), (4002,)),
    RankHost(3, "mac3", ("10.0.0.3", "10.0.1.3"), (4003, 4004)),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project folder whose server only says how it was started."""
    folder = tmp_path / "a project's folder"
    (folder / "server").mkdir(parents=True)
    (folder / "server" / "__main__.py").write_text(REPORT)
    return folder


def command(root: Path, hosts: list[RankHost] | None = None, **fields: Any) -> RingCommand:
    settings = Settings(**{"ring_port": 4000, "worker_dir": "~/our server", **fields})
    return ring_command(settings, root=root, socket_path="/tmp/a b/s", instance="1234", hosts=hosts or HOSTS)


def run_program(ring: RingCommand, rank: int, home: Path) -> dict[str, Any]:
    """Run what mlx.launch would run on a rank."""
    program = ring.argv[ring.argv.index("--") + 1 :]
    env = {**os.environ, "MLX_RANK": str(rank), "HOME": str(home)}
    done = subprocess.run(program, env=env, input=b"\n", capture_output=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_here_runs_in_the_project_folder(root: Path, tmp_path: Path, rank: int):
    report = run_program(command(root), rank, tmp_path)
    assert report == {
        "cwd": str(root),
        "argv": ["--instance", "1234", "--socket", "/tmp/a b/s", "--api-pid", str(os.getpid())],
        "here": "2",
        "stdin": "/dev/null",
    }


def test_a_rank_on_a_worker_runs_its_own_python_in_worker_dir(root: Path, tmp_path: Path):
    worker = tmp_path / "our server"
    (worker / ".venv" / "bin").mkdir(parents=True)
    python = worker / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf \'{"cwd": "%s", "here": "%s"}\' "$PWD" "$MLX_RING_LOCAL_RANKS"\n')
    python.chmod(0o755)
    assert run_program(command(root), 1, tmp_path) == {"cwd": str(worker), "here": "1"}


def test_the_hostfile_names_this_machine_as_mlx_launch_wants_it(root: Path):
    ring = command(root)
    entries = json.loads(Path(ring.argv[ring.argv.index("--hostfile") + 1]).read_text())
    assert [entry["ssh"] for entry in entries] == ["127.0.0.1", "me@mac2", "127.0.0.1", "mac3"]
    assert entries[3]["ips"] == ["10.0.0.3", "10.0.1.3"]
    assert ring.argv[ring.argv.index("--starting-port") + 1] == "4000"


def test_a_ring_of_the_same_hosts_comes_again_where_nothing_can_be_written(root: Path, monkeypatch: pytest.MonkeyPatch):
    first = command(root, HOSTS[:1])

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert command(root, HOSTS[:1]).argv == first.argv
    with pytest.raises(OSError, match="No space left"):
        command(root, HOSTS[:1] * 2)


def values_of(ring: RingCommand, option: str) -> list[str]:
    return [value for name, value in zip(ring.argv, ring.argv[1:]) if name == option]


def test_names_of_others_reach_the_ranks_but_secrets_stay_here(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", "/a disk")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setenv("MLX_METAL_FAST_SYNCH", "1")
    monkeypatch.setenv("MLX_HOSTFILE", "/left/over")
    ring = command(root)
    passed = values_of(ring, "--env")
    assert {"HF_HOME=/a disk", "no_proxy=localhost", "MLX_METAL_FAST_SYNCH=0"} <= set(passed)
    assert "secret" not in " ".join(ring.argv)
    assert "MLX_HOSTFILE" not in ring.env and not any(line.startswith("MLX_HOSTFILE") for line in passed)
    assert ring.env["HF_TOKEN"] == "hf_secret", "the ranks here may use it"


def test_the_environment_of_a_hostfile_reaches_the_ranks(root: Path, tmp_path: Path):
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps({"hosts": [{"ssh": "here", "ips": ["127.0.0.1"]}], "envs": ["A=b c"]}))
    assert "A=b c" in values_of(command(root, HOSTS[:1], hostfile=str(hostfile)), "--env")


def test_ssh_goes_through_a_shim_that_never_asks_and_closes_stdin(root: Path, tmp_path: Path):
    ring = command(root, ssh_options="-F '/a path/config' -p 2222")
    shim = Path(ring.env["PATH"].split(os.pathsep)[0]) / "ssh"
    text = shim.read_text()
    assert "-o BatchMode=yes -F '/a path/config' -p 2222" in text and "</dev/null" in text
    assert os.access(shim, os.X_OK)


def test_mlx_launch_kills_nothing_on_a_worker_by_what_a_login_script_printed(root: Path, tmp_path: Path):
    ring = command(root)
    shim = Path(ring.env["PATH"].split(os.pathsep)[0]) / "ssh"
    ssh = shlex.split(shim.read_text().splitlines()[-1])[1]
    shim.write_text(shim.read_text().replace(ssh, "echo"))
    done = [
        subprocess.run([shim, *sent], capture_output=True, text=True, check=True).stdout
        for sent in (("mac2", RemoteProcess.make_kill_script("** Welcome **")), ("-tt", "mac2", "its rank"))
    ]
    assert done[0] == "" and done[1].endswith("-tt mac2 its rank\n")


def test_without_workers_ssh_is_not_needed(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert command(root, HOSTS[:1]).env["PATH"] == "/nowhere"


def test_the_instance_is_the_same_through_a_link_and_another_in_another_folder(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert instance_id(tmp_path / "link") == instance_id(tmp_path / "real") != instance_id(tmp_path)
