import platform
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from distributed import ssh, worker_probe, workers
from distributed.bring import CODE
from distributed.errors import HostError
from distributed.hosts import RankHost
from distributed.ssh import _ssh_failure
from distributed.version import code_hash
from distributed.workers import (
    PACKAGE_ROOT,
    Facts,
    WorkerModel,
    _differences,
    _link_failure,
    _link_failures,
    missing_files,
    pinned_versions,
)

HERE = RankHost(0, None, ("127.0.0.1",), (4000,))
THERE = RankHost(1, "mac2", ("10.0.0.2",), (4001,))


def good_facts(**changes: Any) -> Facts:
    packages = {name: metadata.version(name) for name in ("mlx", "mlx-lm")}
    return {"code": code_hash(), "packages": packages, "free_bytes": 10**12, "models": {}} | changes


def test_a_worker_like_this_machine_can_take_part():
    assert _differences("mac2", good_facts(), None, 2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": None}, "mac2: our code is not there yet: run ./launch.sh workers"),
        ({"code": "other"}, "mac2: has other code than this machine"),
        ({"packages": {"mlx": "0.1", "mlx-lm": metadata.version("mlx-lm")}}, "mac2: mlx is 0.1, here it is"),
        ({"packages": {}}, "mac2: mlx is not installed"),
    ],
)
def test_each_difference_names_the_host_and_the_mend(changes: Facts, message: str):
    found = _differences("mac2", good_facts(**changes), None, 2)
    assert found[0].startswith(message) and all("run ./launch.sh workers" in line for line in found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "a model"
    (made / "sub").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "sub" / "weights").write_bytes(b"12345")
    return made


@pytest.mark.parametrize("other", [b"1234", b"12346"], ids=["another size", "the same size"])
def test_a_file_that_is_another_is_missing(folder: Path, tmp_path: Path, other: bytes):
    model = WorkerModel("a model", folder, 5)
    shutil.copytree(folder, tmp_path / "older")
    (tmp_path / "older" / "sub" / "weights").write_bytes(other)
    there = {"models/a model": worker_probe.files_of(tmp_path / "older")}
    assert missing_files(model, good_facts(models=there)) == ["sub/weights"]
    there["models/a model"] = worker_probe.files_of(folder)
    assert missing_files(model, good_facts(models=there)) == []


def test_weights_of_another_training_are_told_apart_by_samples(tmp_path: Path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(random.Random(name).randbytes(3_000_000))
    one, other = (worker_probe.files_of(tmp_path / name)["weights"] for name in ("one", "other"))
    assert one[0] == other[0] and one[1] != other[1]


def test_what_was_brought_counts_before_a_folder_at_the_same_place_as_here(folder: Path):
    """The rank there takes it (`test_a_worker_takes_the_model_that_was_brought`)."""
    model = WorkerModel("~/a model", folder, 5)
    facts = good_facts(
        models={"models/a model": {"config.json": [2, "old"]}, "~/a model": worker_probe.files_of(folder)}
    )
    assert missing_files(model, facts) == ["config.json", "sub/weights"]


def test_a_folder_at_the_same_place_on_the_worker_serves_but_not_for_the_embedded_model(folder: Path):
    facts = good_facts(models={str(folder): worker_probe.files_of(folder)})
    assert missing_files(WorkerModel(str(folder), folder, 5), facts) == []
    assert len(missing_files(WorkerModel("builtin", folder, 5), facts)) == 2


def test_a_disk_too_small_for_a_download_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    place = "~/.cache/huggingface/hub/models--org--large"
    model = WorkerModel("org/large", None, 100 * 10**9)
    facts = good_facts(free_bytes=40 * 10**9, models={place: {}})
    (message,) = _differences("mac2", facts, model, 2)
    assert message.startswith("mac2: about 50 GB of org/large")
    facts["models"][place] = {"blobs/abc": [20 * 10**9, ""], "snapshots/1/model.safetensors": [20 * 10**9, ""]}
    assert _differences("mac2", facts, model, 2) == []


@pytest.mark.parametrize(
    ("stderr", "mend"),
    [
        ("me@mac2: Permission denied (publickey,password).", "ssh-copy-id mac2"),
        ("Host key verification failed.", "run `ssh mac2` once"),
        ("ssh: connect to host mac2 port 22: Connection refused", "Remote Login"),
        ("ssh: connect to host mac2 port 22: No route to host", "Local Network"),
        ("something new", "try `ssh mac2` by hand"),
    ],
)
def test_what_ssh_says_becomes_what_to_do(stderr: str, mend: str):
    message = _ssh_failure("mac2", stderr)
    assert message.startswith("mac2: ") and mend in message and stderr in message


def test_the_lock_pins_every_package_once_for_the_system_it_is_for():
    pins = pinned_versions()
    assert pins["mlx-metal"][1] == "Darwin" and pins["mlx-cpu"][1] == "Linux"
    lines = (PACKAGE_ROOT / "requirements.lock").read_text().splitlines()
    assert len(pins) == len([line for line in lines if line and not line.startswith("#")])
    for name, (version, system) in pins.items():
        if system in (None, platform.system()):
            assert metadata.version(name) == version


def test_facts_are_what_the_machine_has(tmp_path: Path, folder: Path):
    for part in CODE[:3]:
        shutil.copytree(PACKAGE_ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    found = worker_probe.facts(tmp_path, ["mlx", "no-such-package"], ["a model", "none"])
    assert found["code"] == code_hash()
    assert found["packages"] == {"mlx": metadata.version("mlx"), "no-such-package": None}
    assert found["models"] == {"a model": worker_probe.files_of(folder), "none": {}}
    assert {name: size for name, (size, _) in found["models"]["a model"].items()} == {
        "config.json": 2,
        "sub/weights": 5,
    }
    assert worker_probe.facts(tmp_path / "not" / "there", [], [])["code"] is None


# -- asking ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Facts]:
    """What is made of an answer: ssh is a script that prints it."""

    def ask(script: str) -> Facts:
        argv = ["sh", "-c", script]
        monkeypatch.setattr(ssh, "ssh_argv", lambda *_: argv)
        monkeypatch.setattr(workers, "ssh_argv", lambda *_: argv)
        return workers.ask_facts(Settings(), "mac2", None)

    return ask


def test_what_a_login_script_prints_around_the_answer_is_passed_over(answered: Callable[[str], Facts]):
    assert answered("echo '** Welcome **'; echo 7; echo '{\"code\": 1}'; echo bye") == {"code": 1}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "mac2: its login shell ends before .* (it printed nothing)"),
        ("echo hi", "mac2: its login shell ends before .* (hi): look for exit or exec in ~/.bashrc"),
        ("echo This account is currently not available.; exit 1", "mac2: This account is currently not available."),
    ],
)
def test_a_login_shell_that_does_not_run_what_is_sent_is_named(
    answered: Callable[[str], Facts], script: str, message: str
):
    with pytest.raises(HostError, match=message.replace("(", r"\(").replace(")", r"\)")):
        answered(script)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo Connection refused >&2; exit 255", "mac2: no ssh server runs there"),
        ("sleep 9", "mac2: did not answer within 0 s"),
        ("exit 2", "mac2: its login shell is neither bash nor zsh"),
    ],
)
def test_a_host_lost_while_its_shell_is_looked_at_is_not_blamed_for_its_shell(
    monkeypatch: pytest.MonkeyPatch, script: str, message: str
):
    monkeypatch.setattr(workers, "ssh_argv", lambda *_: ["sh", "-c", script])
    monkeypatch.setattr(workers, "ANSWER_TIMEOUT_S", 0.3)
    with pytest.raises(HostError, match=message):
        workers.check_login_shell(Settings(), "mac2")


# -- links -----------------------------------------------------------------------------------------------------------


def free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()


@contextmanager
def free_port_that_refuses() -> Iterator[int]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_three_ranks_find_each_other_and_measure_their_links():
    places = [free_address() for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(worker_probe.link, places[rank], places[(rank + 1) % 3], f"t{(rank - 1) % 3}", f"t{rank}", 10.0)
            for rank in range(3)
        ]
    for answer in asked:
        assert answer.result()["latency_ms"] > 0 and answer.result()["bytes_per_s"] > 1e6


def test_a_next_rank_that_does_not_listen_is_named():
    result = worker_probe.link(free_address(), free_address(), "a", "b", 0.3)
    assert result["error"] == "connect"
    message = _link_failure(HERE, THERE, result)
    assert message is not None and message.startswith("this machine: cannot connect to mac2 at 10.0.0.2:4001")


def test_a_firewall_that_lets_in_the_ring_port_alone_is_found_before_a_start():
    """Else three starts fail, each after half a minute."""
    with free_port_that_refuses() as refused, socket.create_server(("127.0.0.1", 0)) as following:

        def lets_in_the_ring_port_alone() -> None:
            connection, _ = following.accept()
            with connection:
                connection.recv(1)
                connection.sendall(b"!%05d" % refused)
                connection.recv(100)

        with ThreadPoolExecutor() as pool:
            pool.submit(lets_in_the_ring_port_alone)
            result = worker_probe.link(free_address(), following.getsockname(), "a", "b", 1.0)
    assert result["error"] == "control"
    message = _link_failure(HERE, THERE, result)
    assert message is not None and "mac2 lets it in at the ring's port 4001, and not at one that the system" in message


def test_a_ring_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = worker_probe.link(taken.getsockname(), free_address(), "a", "b", 0.3)
    assert result == {"error": "listen", "reason": "in use"}
    message = _link_failure(THERE, HERE, result)
    assert message is not None and message.startswith("mac2: port 4001 is in use there")


def test_what_a_neighbours_failure_brings_with_it_is_not_said_beside_it():
    results = [{"error": "connect", "reason": "timed out"}, {"error": "listen", "reason": "in use"}]
    (message,) = _link_failures([HERE, THERE], results)
    assert message.startswith("mac2: port 4001 is in use there")
    (message,) = _link_failures([HERE, THERE], [{"error": "accept", "reason": "did not connect"}, {"latency_ms": 1.0}])
    assert message.startswith("this machine: did not connect")


def test_a_stranger_on_the_ring_port_is_not_taken_for_the_rank_before():
    own = free_address()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(worker_probe.link, own, own, "before", "stranger", 1.0)
        assert asked.result()["error"] in ("accept", "connect")


@pytest.mark.ring
def test_brought_parts_are_all_a_rank_imports(tmp_path: Path):
    """A worker gets CODE and nothing else; a new top-level package that ranks import must be added there."""
    for part in CODE[:3]:
        shutil.copytree(PACKAGE_ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import server.startup, server.worker, server.engine"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
