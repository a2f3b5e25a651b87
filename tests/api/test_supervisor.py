import socket
from pathlib import Path

import pytest

from api.engine_client import EngineClient
from api.errors import NotReady
from api.supervisor import RingLost, Supervisor, check_ports, local_ports
from config import Settings
from distributed.hosts import RankHost
from tests.running_server import free_ports


def host(rank: int, *ports: int, ssh: str | None = None) -> RankHost:
    return RankHost(rank, ssh, ("127.0.0.1",) * len(ports), ports)


def test_a_taken_ring_port_is_named():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as MLX's ring does, which would hide the clash
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RingLost, match=f"ring port {port} on 127.0.0.1") as raised:
            check_ports([("127.0.0.1", free_ports(1)), ("127.0.0.1", port)])
        assert not raised.value.permanent


def test_free_ring_ports_are_fine():
    check_ports([("127.0.0.1", free_ports(1))])


def test_only_the_ports_of_this_machine_s_ranks_are_ours_to_check():
    hosts = [host(0, 5000, 5001), host(1, 5002, ssh="elsewhere"), host(2, 5003)]
    assert [port for _, port in local_ports(hosts)] == [5000, 5001, 5003]
    assert local_ports([host(0, 5000)]) == []  # a ring of one listens nowhere


def test_nothing_is_accepted_before_a_ring_was_ready(tmp_path: Path):
    engine = EngineClient({}, max_queued_requests=1, request_timeout_s=1)
    supervisor = Supervisor(Settings(project_root=tmp_path), engine, "test")
    with pytest.raises(NotReady, match="The server is starting") as raised:
        supervisor.accepting()
    assert raised.value.retry_after_s
    assert list(supervisor.ranks) == []
    supervisor.close()
