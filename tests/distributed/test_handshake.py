"""Ranks that are not alike find out before anything is loaded."""

import msgspec
import pytest

from distributed.errors import HandshakeError, RingError
from distributed.handshake import Introduction, check_versions, read_introductions
from distributed.version import versions


def introduction(host: str, **changes: str) -> Introduction:
    return Introduction(host, 1, versions() | changes, 0, "")


def test_equal_versions_pass_whatever_python_they_run():
    check_versions([introduction("a"), introduction("b", python="3.99")])


@pytest.mark.parametrize("name", ["mlx", "mlx-lm", "mlx-ring-server"])
def test_a_difference_names_rank_host_and_both_versions(name: str):
    everyone = [introduction("first"), introduction("second"), introduction("third", **{name: "0.0.1"})]
    with pytest.raises(HandshakeError, match=rf"rank 2 \(third\) runs {name} 0\.0\.1, rank 0 \(first\) runs"):
        check_versions(everyone)


def test_changed_code_is_another_version():
    assert versions()["mlx-ring-server"].count("+") == 1


@pytest.mark.parametrize("record", [b"", b"GET / HTTP/1.1", b"\xff" * 100, b"{}", b'{"host": 7}'])
def test_what_a_stranger_puts_into_the_ring_is_no_final_error(record: bytes):
    ours = msgspec.json.encode(introduction("first"))
    with pytest.raises(RingError, match="a stranger called at a ring port") as raised:
        read_introductions([ours, record])
    assert not isinstance(raised.value, HandshakeError)
