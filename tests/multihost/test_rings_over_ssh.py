"""Rings of 2 and 3 hosts, each with its own address and sshd, driven through launch.sh as on real machines."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from config import load_config
from distributed.bring import bring_code, make_environment
from distributed.errors import HostError
from distributed.remnants import end_on_workers
from tests.launched_project import LaunchedProject, link_environment
from tests.multihost.namespaces import Hosts, make_hosts, why_not

pytestmark = pytest.mark.ring

HELLO: Any = {"role": "user", "content": "hello"}
IDLE_S = 4.0
WORKER_DIR = "~/a server's folder"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(f"no other hosts can be made here: it {reason}")
    with make_hosts(tmp_path_factory.mktemp("hosts"), 2) as made:
        yield made


# Most tests need only two hosts; a ring of three has a link between two machines that are not this one.
two_hosts = pytest.mark.parametrize("project", [2], ids=["2 hosts"], indirect=True, scope="module")
two_and_three_hosts = pytest.mark.parametrize(
    "project", [2, 3], ids=["2 hosts", "3 hosts"], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def project(
    request: pytest.FixtureRequest, hosts: Hosts, tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LaunchedProject]:
    """A project whose .env names the hosts; the model lies where the other hosts cannot see it."""
    size = int(request.param)
    model = hosts.hidden / f"tiny for {size}"
    shutil.copytree(tiny_chat_model, model)
    made = LaunchedProject(
        tmp_path_factory.mktemp("multihost") / "a project",
        WORKER_HOSTS=",".join(host.address for host in hosts.others[: size - 1]),
        SSH_OPTIONS=f"\"-F '{hosts.ssh_config}'\"",
        WORKER_DIR=f'"{WORKER_DIR}"',
        MODEL_REPO=f'"{model}"',
        MODEL_NAME="tiny",
        KV_CACHE_RESERVED_MEMORY_MB=64,
    )
    for host in hosts.others:
        shutil.rmtree(worker_folder(host.home), ignore_errors=True)
        link_environment(worker_folder(host.home))
    yield made
    made.launch("stop")
    made.end()


@pytest.fixture(scope="module")
def brought(project: LaunchedProject) -> str:
    """What `workers` printed when it brought everything."""
    done = project.launch("workers")
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def serving(project: LaunchedProject, brought: str) -> LaunchedProject:
    """The project with its server running."""
    started = project.launch("start")
    assert started.returncode == 0, started.stdout
    return project


@pytest.fixture
def stopped(project: LaunchedProject, brought: str) -> LaunchedProject:
    project.launch("stop")
    return project


def worker_folder(home: Path) -> Path:
    return home / WORKER_DIR.removeprefix("~/")


@two_hosts
def test_start_refuses_hosts_that_have_no_code_and_names_the_mend(project: LaunchedProject):
    started = project.launch("start")
    assert started.returncode == 1
    for target in targets_of(project):
        assert f"{target}: our code is not there yet: run ./launch.sh workers" in started.stdout
    assert project.processes() == []


@two_and_three_hosts
def test_workers_brings_code_and_model_and_checks_every_link(project: LaunchedProject, brought: str, hosts: Hosts):
    targets = targets_of(project)
    for target, host in zip(targets, hosts.others):
        assert f"{target}: code brought" in brought
        assert f"{target}: environment is up to date" in brought
        assert len(list((worker_folder(host.home) / "models").glob("tiny*/config.json"))) == 1
    assert brought.count("link ") == len(targets) + 1
    again = project.launch("workers")
    assert again.stdout.count("is up to date") == 2 * len(targets), "what is there is not sent again"
    assert project.processes() == []


@two_and_three_hosts
def test_a_chat_is_answered_by_ranks_on_all_hosts(serving: LaunchedProject):
    ranks = serving.health()["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(len(targets_of(serving)) + 1))
    with OpenAI(base_url=f"http://127.0.0.1:{serving.keys['API_PORT']}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="tiny", messages=[HELLO], max_tokens=8, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens >= 1
    shown = serving.launch("status")
    assert shown.returncode == 0 and shown.stdout.startswith("ready"), shown.stdout


@two_and_three_hosts
def test_an_idle_ring_over_ssh_sleeps(serving: LaunchedProject):
    """mlx.launch spins a core while its ranks' stdin is open; ours are closed, the ssh ones by the shim."""
    time.sleep(1.5)  # mlx.launch looks at its stdin ten times a second
    processes = serving.processes()
    names = [" ".join(process.info["cmdline"]) for process in processes]
    assert any("mlx.launch" in name for name in names) and any("/ssh -o" in name for name in names)
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(IDLE_S)
    cores = (sum(sum(process.cpu_times()[:2]) for process in processes) - before) / IDLE_S
    assert cores < 0.03


@two_hosts
def test_a_cut_ssh_ends_its_rank_and_the_ring_comes_back(serving: LaunchedProject):
    pids = {process.pid for process in serving.ranks()}
    ssh = next(process for process in serving.processes() if process.info["cmdline"][0].endswith("/ssh"))
    ssh.kill()
    wait_until(lambda: not pids & {process.pid for process in serving.ranks()}, "old ranks gone", 20)
    wait_until(lambda: is_ready_without(serving, pids), "ready again", 60)


@two_hosts
def test_a_pulled_cable_ends_the_ranks_on_both_sides_and_the_ring_comes_back(serving: LaunchedProject, hosts: Hosts):
    """While the cable is out the host is named and waited for, and so do requests; then all goes on by itself."""
    pids = {process.pid for process in serving.ranks()}
    host = hosts.others[0]
    with OpenAI(base_url=f"http://127.0.0.1:{serving.keys['API_PORT']}/v1", api_key="none", max_retries=0) as client:

        def ask(*, stream: bool) -> Any:
            return client.chat.completions.create(
                model="tiny", messages=[HELLO], max_tokens=1500, temperature=0, stream=stream
            )

        whole = ask(stream=False).choices[0].message.content
        chunks = iter(ask(stream=True))
        text = "".join(next(chunks).choices[0].delta.content or "" for _ in range(5))
        host.cut()
        try:
            wait_until(lambda: not pids & {process.pid for process in serving.ranks()}, "old ranks gone", 30)
            wait_until(lambda: bool(serving.health()["waiting_for"]), "the host is named", 30)
            (absence,) = serving.health()["waiting_for"]
            assert absence["host"] == host.address and absence["reason"]
            assert f"waits     for {host.address} since" in serving.launch("status").stdout
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(ask, stream=False)
                wait_until(lambda: serving.health()["requests"]["waiting"] == 2, "both wait", 10)
                host.mend()
                wait_until(lambda: is_ready_without(serving, pids), "ready again", 60)
                assert waiting.result(60).choices[0].message.content == whole
        finally:
            host.mend()
        assert text + "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        assert serving.health()["waiting_for"] == []


@two_hosts
def test_every_rank_ends_when_this_side_dies(serving: LaunchedProject):
    for process in serving.processes():
        if process.info["cmdline"][1:3] != ["-m", "server"]:
            with contextlib.suppress(psutil.NoSuchProcess):  # some end with those before them
                process.kill()  # the api, mlx.launch and ssh
    wait_until(lambda: serving.ranks() == [], "no rank left", 20)


@two_hosts
def test_workers_does_not_replace_code_that_runs(serving: LaunchedProject):
    done = serving.launch("workers")
    assert done.returncode == 1 and "./launch.sh stop first" in done.stdout


@two_and_three_hosts
def test_stop_leaves_nothing_on_any_host(serving: LaunchedProject):
    for process in serving.ranks():
        process.suspend()  # a hung rank
    done = serving.launch("stop", keys={"SHUTDOWN_GRACE_S": "1"})
    assert done.returncode == 0, done.stdout
    assert serving.processes() == []
    assert serving.launch("status").returncode == 3


@two_hosts
def test_stop_ends_what_hangs_on_another_host(project: LaunchedProject, hosts: Hosts):
    """Asks the worker alone, as `stop` does for machines whose processes it cannot see."""
    marker = f"-m server --instance {project.instance}"
    deaf = "trap '' TERM; while :; do sleep 0.2; done"
    left = [subprocess.Popen(["sh", "-c", script, marker]) for script in ("sleep 300; true", "sleep 300; true", deaf)]
    left[1].send_signal(signal.SIGSTOP)
    settings = load_config(project.root, environ={})
    assert end_on_workers(settings, [hosts.others[0].address], project.instance) == {}
    assert [process.wait(1) for process in left] == [-signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL]


@two_hosts
def test_changed_code_on_a_host_is_refused(stopped: LaunchedProject, hosts: Hosts):
    changed = worker_folder(hosts.others[0].home) / "server" / "__init__.py"
    original = changed.read_text()
    changed.write_text(original + "\n# changed\n")
    try:
        started = stopped.launch("start")
    finally:
        changed.write_text(original)
    assert started.returncode == 1 and f"{hosts.others[0].address}: has other code" in started.stdout


@two_hosts
def test_code_that_is_not_ours_is_never_replaced(stopped: LaunchedProject, hosts: Hosts):
    foreign = hosts.others[0].home / "config"
    foreign.mkdir()
    done = stopped.launch("workers", keys={"WORKER_DIR": "~"})
    assert done.returncode == 1 and "not ours to replace: set WORKER_DIR" in done.stdout
    assert foreign.is_dir() and list(foreign.iterdir()) == []
    foreign.rmdir()


@two_hosts
def test_an_environment_is_made_over_ssh(stopped: LaunchedProject, hosts: Hosts):
    """With an empty lock, as these hosts reach no package index."""
    settings = load_config(stopped.root, environ={"WORKER_DIR": "~/from nothing"})
    folder = hosts.others[0].home / "from nothing"
    target = hosts.others[0].address
    bring_code(settings, target)
    (folder / "requirements.lock").write_text("# nothing\n")
    said: list[str] = []
    make_environment(settings, target, said.append)
    assert f"{target}: making {folder}/.venv" in said[0]
    assert subprocess.run([folder / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=False).returncode == 0
    (folder / "requirements.lock").write_text("idna==3.20\n")
    with pytest.raises(HostError, match=f"{target}: the environment could not be made there .*idna"):
        make_environment(settings, target, said.append)


@two_hosts
def test_a_port_in_use_on_a_host_is_named(stopped: LaunchedProject, hosts: Hosts):
    port = int(str(stopped.keys["RING_PORT"])) + 1
    address = hosts.others[0].address
    code = (
        f"import socket, time; s = socket.create_server(('{address}', {port})); print('up', flush=True); time.sleep(99)"
    )
    argv = ["ssh", "-F", str(hosts.ssh_config), "-tt", address, f'{shlex.quote(sys.executable)} -c "{code}"']
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout is not None and b"up" in holder.stdout.readline()
        started = stopped.launch("start")
        holder.terminate()
    assert started.returncode == 1
    assert f"{address}: port {port} is in use there" in started.stdout, started.stdout


@two_hosts
def test_a_host_without_a_network_is_named_with_its_mend(stopped: LaunchedProject, hosts: Hosts):
    hosts.others[0].cut()
    try:
        done = stopped.launch("workers")
    finally:
        hosts.others[0].mend()
    assert done.returncode == 1
    assert f"{hosts.others[0].address}: it" in done.stdout and "check" in done.stdout


def targets_of(project: LaunchedProject) -> list[str]:
    return str(project.keys["WORKER_HOSTS"]).split(",")


def is_ready_without(project: LaunchedProject, pids: set[int]) -> bool:
    """Whether a ring serves none of whose ranks is one of `pids`."""
    health = project.health()
    return health["status"] == "ready" and len(health["ranks"]) > 1 and not pids & {r["pid"] for r in health["ranks"]}


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not {what} within {timeout_s:.0f} s"
        time.sleep(0.1)
