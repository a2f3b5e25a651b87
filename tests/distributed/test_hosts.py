import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from distributed.errors import HostError
from distributed.hosts import is_own_address, own_address_towards, ring_hosts, worker_targets

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="needs the ssh client")
ELSEWHERE = "192.0.2.7"  # an address of documentation (RFC 5737): on no machine


def settings(**fields: Any) -> Settings:
    return Settings(**{"ring_port": 4000, **fields})


@pytest.fixture
def ssh_config(tmp_path: Path) -> str:
    """SSH_OPTIONS with a configuration that gives the name `worker` an address."""
    path = tmp_path / "ssh config"
    path.write_text(f"Host worker\n  HostName {ELSEWHERE}\nHost self\n  HostName 127.0.0.1\n")
    return f"-F '{path}'"


def test_without_workers_all_ranks_are_here_with_a_port_each():
    hosts = ring_hosts(settings(ring_size=3))
    assert [(host.rank, host.ssh, host.address, host.ports) for host in hosts] == [
        (rank, None, "127.0.0.1", (4000 + rank,)) for rank in range(3)
    ]
    assert worker_targets(hosts) == []


@needs_ssh
def test_worker_names_are_resolved_as_ssh_would(ssh_config: str):
    hosts = ring_hosts(settings(worker_hosts=("me@worker",), ring_host="127.0.0.1", ssh_options=ssh_config))
    assert [(host.ssh, host.address, host.ports) for host in hosts] == [
        (None, "127.0.0.1", (4000,)),
        ("me@worker", ELSEWHERE, (4001,)),
    ]


@needs_ssh
def test_a_worker_named_twice_gets_two_ranks_and_is_asked_once(ssh_config: str):
    keys = settings(worker_hosts=("worker", "worker"), ring_host="127.0.0.1", ssh_options=ssh_config)
    hosts = ring_hosts(keys)
    assert len(hosts) == 3 and worker_targets(hosts) == ["worker"]


def test_localhost_as_a_worker_is_a_second_rank_here():
    hosts = ring_hosts(settings(worker_hosts=("127.0.0.1",)))
    assert [host.is_local for host in hosts] == [True, True]


@needs_ssh
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"worker_hosts": ("no-such-host.invalid",)}, "WORKER_HOSTS: no-such-host.invalid"),
        ({"worker_hosts": ("worker",), "ring_host": ELSEWHERE}, f"RING_HOST={ELSEWHERE}: no interface"),
        ({"worker_hosts": ("self",)}, "self is this machine"),
        ({"worker_hosts": ("worker", "me@worker")}, "worker and me@worker are one machine"),
        ({"worker_hosts": ("fd00::2",)}, "neither IPv6 nor a port after a colon"),
        ({"worker_hosts": ("worker:22",)}, "neither IPv6 nor a port after a colon"),
    ],
)
def test_a_host_that_cannot_be_is_named_with_its_key(ssh_config: str, fields: dict[str, Any], message: str):
    with pytest.raises(HostError, match=message):
        ring_hosts(settings(ssh_options=ssh_config, **fields))


def test_the_own_address_is_the_one_on_the_way():
    assert own_address_towards("127.0.0.1") == "127.0.0.1"
    assert is_own_address("127.0.0.1") and not is_own_address(ELSEWHERE)


def write_hostfile(folder: Path, content: Any) -> Settings:
    path = folder / "hosts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return settings(hostfile=str(path))


@pytest.mark.parametrize("as_dict", [False, True], ids=["a list", "mlx.distributed_config's form"])
def test_a_hostfile_gives_ranks_with_all_their_addresses(tmp_path: Path, as_dict: bool):
    entries = [
        {"ssh": socket.gethostname(), "ips": ["127.0.0.1"]},
        {"ssh": "other", "ips": [ELSEWHERE, "192.0.2.8"]},
        {"ssh": "last", "ips": ["192.0.2.9"]},
    ]
    content = {"backend": "ring", "envs": ["A=b"], "hosts": entries} if as_dict else entries
    hosts = ring_hosts(write_hostfile(tmp_path, content))
    assert [(host.ssh, host.addresses, host.ports) for host in hosts] == [
        (None, ("127.0.0.1",), (4000,)),
        ("other", (ELSEWHERE, "192.0.2.8"), (4001, 4002)),
        ("last", ("192.0.2.9",), (4003,)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "one entry a rank"),
        ([{"ssh": "a"}], "entry 0 must have"),
        ([{"ssh": "a", "ips": [ELSEWHERE]}], "must be this machine"),
        ({"backend": "jaccl", "hosts": [{"ssh": "a", "ips": ["127.0.0.1"]}]}, "jaccl"),
    ],
)
def test_a_hostfile_that_cannot_be_used_says_why(tmp_path: Path, content: Any, message: str):
    with pytest.raises(HostError, match=message):
        ring_hosts(write_hostfile(tmp_path, content))
