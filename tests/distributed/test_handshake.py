"""Ranks that are not alike find out before anything is loaded."""

import pytest

from distributed.errors import HandshakeError
from distributed.handshake import Introduction, check_versions
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
