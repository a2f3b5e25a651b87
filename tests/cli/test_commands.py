"""launch.sh as people use it: real servers of a tiny model, in a folder with a space in its path."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from tests.launched_project import LaunchedProject, clean_environment

pytestmark = pytest.mark.ring


@pytest.fixture(scope="module")
def served(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LaunchedProject, str]]:
    """A project that was started from another folder, and what start printed."""
    project = new_project(tmp_path_factory.mktemp("cli"), tiny_chat_model)
    project.write_dotenv(SHUTDOWN_GRACE_S=60)
    started = project.launch("start", cwd=Path("/"))
    assert started.returncode == 0, started.stdout
    yield project, started.stdout
    project.launch("stop")
    project.end()


@pytest.fixture
def project(tiny_chat_model: Path, tmp_path: Path) -> Iterator[LaunchedProject]:
    """A project that does not run yet."""
    made = new_project(tmp_path, tiny_chat_model)
    yield made
    made.end()


def new_project(folder: Path, model: Path, **keys: object) -> LaunchedProject:
    return LaunchedProject(
        folder / "a project's folder",
        MODEL_REPO=f'"{model}"',
        MODEL_NAME="tiny",
        KV_CACHE_RESERVED_MEMORY_MB=64,
        SHUTDOWN_GRACE_S=2,
        **keys,
    )


# -- a server that runs ----------------------------------------------------------------------------------------------


def test_start_prints_the_url_and_what_each_rank_holds(served: tuple[LaunchedProject, str]):
    project, printed = served
    assert f"ready: tiny at http://127.0.0.1:{project.keys['API_PORT']}/v1" in printed
    assert re.search(r"^0 .* \[0, \d+\)", printed, re.MULTILINE)
    assert re.search(r"^1 .* \[\d+, \d+\)", printed, re.MULTILINE)


def test_the_curl_line_that_start_prints_works(served: tuple[LaunchedProject, str]):
    _, printed = served
    line = printed[printed.index("curl ") :].strip()
    if not any(Path(folder, "curl").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("needs curl")
    answer = subprocess.run(["bash", "-c", line + " -sS --noproxy '*'"], capture_output=True, text=True, check=True)
    assert '"choices"' in answer.stdout, answer.stdout


def test_a_second_start_says_it_runs_already(served: tuple[LaunchedProject, str]):
    project, _ = served
    before = {process.pid for process in project.processes()}
    again = project.launch("start", keys={"RING_SIZE": "3", "LOG_LEVEL": "debug"})
    assert again.returncode == 0 and "already running" in again.stdout
    assert "differs from what runs in LOG_LEVEL, RING_SIZE: ./launch.sh restart" in again.stdout
    assert "differs" not in project.launch("start").stdout
    assert {process.pid for process in project.processes()} == before


def test_status_shows_ranks_layers_memory_and_requests(served: tuple[LaunchedProject, str]):
    project, _ = served
    shown = project.launch("status")
    assert shown.returncode == 0
    for wanted in ("ready", "tiny", "uptime", "0 running, 0 waiting", "64 MiB", "[0, "):
        assert wanted in shown.stdout
    assert "differs" not in shown.stdout


def test_status_tells_of_what_runs_whatever_is_set_by_now(served: tuple[LaunchedProject, str]):
    project, _ = served
    elsewhere = project.launch("status", keys={"API_PORT": "1"})
    assert elsewhere.returncode == 0 and elsewhere.stdout.startswith("ready"), elsewhere.stdout
    assert f"127.0.0.1:{project.keys['API_PORT']}/v1" in elsewhere.stdout and "API_PORT" in elsewhere.stdout
    wrong = project.launch("status", keys={"RING_SIZE": "two"})
    assert wrong.returncode == 0 and wrong.stdout.startswith("ready"), wrong.stdout
    assert "0 running" in wrong.stdout and "\nRING_SIZE=two (the environment)" in wrong.stdout


def test_plan_knows_the_times_that_the_first_start_measured(served: tuple[LaunchedProject, str]):
    project, _ = served
    planned = project.launch("plan")
    assert planned.returncode == 0 and "by measured times" in planned.stdout, planned.stdout
    other = project.launch("plan", keys={"RING_SIZE": "1"})
    assert other.returncode == 0 and "the server that runs has layers [0, " in other.stdout, other.stdout


def test_the_script_works_through_a_link(served: tuple[LaunchedProject, str], tmp_path: Path):
    project, _ = served
    (tmp_path / "server").symlink_to(project.root / "launch.sh")
    shown = subprocess.run(
        [tmp_path / "server", "status"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("ready")


def test_logs_follow_the_file_across_rotation(served: tuple[LaunchedProject, str]):
    project, _ = served
    log = project.root / "server.log"
    argv = [str(project.root / "launch.sh"), "logs", "-n", "1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as follower:
        assert follower.stdout is not None
        os.set_blocking(follower.stdout.fileno(), True)
        assert follower.stdout.readline()
        log.rename(project.root / "server.log.1")
        log.write_text("after the rotation\n")
        try:
            assert follower.stdout.readline() == "after the rotation\n"
        finally:
            follower.terminate()
            (project.root / "server.log.1").replace(log)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"API_PORT": "many"}, "API_PORT=many (the environment)"),
        ({"MODEL_REPO": "/no/such/model"}, "MODEL_REPO=/no/such/model: there is no such folder"),
        ({"LAYER_SPLIT": "20,20"}, "LAYER_SPLIT=20,20 adds up to 40"),
        ({"RANK_MEMORY_LIMIT_MB": "1"}, "RANK_MEMORY_LIMIT_MB in the environment"),
        ({"API_PORT": "taken"}, "API_PORT=taken: cannot listen there"),
        ({"RING_PORT": "taken"}, "ring port taken on 127.0.0.1 cannot be used"),
    ],
    ids=lambda value: "=".join(*value.items()) if isinstance(value, dict) else "",
)
def test_a_restart_that_cannot_work_leaves_the_running_server_alone(
    served: tuple[LaunchedProject, str], keys: dict[str, str], message: str
):
    project, _ = served
    before = {process.pid for process in project.processes()}
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        again = project.launch("restart", keys={key: value.replace("taken", taken) for key, value in keys.items()})
    assert again.returncode == 1 and message.replace("taken", taken) in again.stdout, again.stdout
    assert "nothing was stopped: the server" in again.stdout
    if "taken" in keys.values():
        assert f"process {os.getpid()}" in again.stdout, "who has the port"
    assert {process.pid for process in project.processes()} == before
    assert project.health()["status"] == "ready"


def test_the_server_outlives_the_terminal_it_was_started_from(served: tuple[LaunchedProject, str]):
    project, _ = served
    assert os.getsid(api_pid(project)) == api_pid(project), "a session of its own"


# -- restart ---------------------------------------------------------------------------------------------------------


class Stream:
    """An answer that comes, as text. It takes the tiny model some seconds."""

    def __init__(self, project: LaunchedProject) -> None:
        client = OpenAI(base_url=f"http://127.0.0.1:{project.keys['API_PORT']}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": "hello world"}]
        self._chunks: Any = client.chat.completions.create(
            messages=messages,
            model="tiny",
            max_tokens=1900,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        self.id = ""
        self.text = ""

    def read(self, num_chunks: int | None = None) -> str:
        """All text so far, after so many more chunks or at the end."""
        for chunk in islice(self._chunks, num_chunks):
            self.id = chunk.id
            self.text += chunk.choices[0].delta.content or ""
        return self.text


def api_pid(project: LaunchedProject) -> int:
    (api,) = [process for process in project.processes() if process.info["cmdline"][1:3] == ["-m", "api"]]
    return api.pid


@pytest.fixture(scope="module")
def undisturbed(served: tuple[LaunchedProject, str]) -> str:
    return Stream(served[0]).read()


def test_a_stream_goes_on_over_a_restart_that_changes_the_ring_alone(
    served: tuple[LaunchedProject, str], undisturbed: str
):
    project, _ = served
    api, log = api_pid(project), project.root / "server.log"
    for ring_size in (1, 2, 1):  # on a busy machine the stream may end before `restart` has read its settings
        stream = Stream(project)
        stream.read(20)
        project.write_dotenv(RING_SIZE=ring_size, LOG_LEVEL="info")  # the same level
        began = len(log.read_text())
        again = project.launch("restart")
        assert again.returncode == 0 and again.stdout.count("a new ring takes over") == 1, again.stdout
        assert "ready: tiny" in again.stdout
        assert stream.read() == undisturbed
        while stream.id not in (said := log.read_text()[began:]):
            time.sleep(0.02)  # the client hears of the end a moment before the log does
        assert (len(project.ranks()), api_pid(project)) == (ring_size, api)
        if went_on := said.index("restarting -> ready") < said.index(stream.id):
            break
    assert went_on, "each stream ended before its ring did"


def test_settings_that_give_no_ring_make_way_for_those_that_served(served: tuple[LaunchedProject, str]):
    project, _ = served
    api, num_ranks = api_pid(project), len(project.ranks())
    project.write_dotenv(MAX_SEQUENCE_LENGTH=10**9)  # which only the ring can judge
    try:
        again = project.launch("restart")
    finally:
        project.write_dotenv(MAX_SEQUENCE_LENGTH="")
    assert again.returncode == 1, again.stdout
    assert again.stdout.count("MAX_SEQUENCE_LENGTH=") == 1, again.stdout
    assert "those from before serve: " in again.stdout and "(set: MAX_SEQUENCE_LENGTH in .env line " in again.stdout
    assert "those from before serve: " in project.launch("status").stdout
    assert (len(project.ranks()), api_pid(project)) == (num_ranks, api)
    assert Stream(project).read(5)


def test_a_restart_with_another_name_of_the_model_lets_requests_end_first(
    served: tuple[LaunchedProject, str], undisturbed: str
):
    project, _ = served
    api = api_pid(project)
    stream = Stream(project)
    stream.read(20)
    project.write_dotenv(MODEL_NAME="renamed")
    try:
        again = project.launch("restart")
        assert again.returncode == 0 and "ready: renamed" in again.stdout
        assert stream.read() == undisturbed
        assert api_pid(project) != api
    finally:
        project.write_dotenv(MODEL_NAME="tiny")


# -- plans and mistakes, without a server ----------------------------------------------------------------------------


def test_plan_shows_what_would_run_where_and_starts_nothing(project: LaunchedProject):
    planned = project.launch("plan")
    assert planned.returncode == 0 and planned.stdout.count("fits") == 2, planned.stdout
    assert "times the mean (by the bytes each rank reads in a step: nothing is measured yet)" in planned.stdout
    too_much = project.launch("plan", keys={"KV_CACHE_RESERVED_MEMORY_MB": "100000000"})
    assert too_much.returncode == 1 and "DOES NOT FIT" in too_much.stdout and "KV_CACHE_RESERVED" in too_much.stdout
    with socket.create_server(("127.0.0.1", int(str(project.keys["API_PORT"])))):
        alone = project.launch("plan", keys={"RING_SIZE": "1"})
    assert ", 1 rank\n" in alone.stdout and f"process {os.getpid()}" in alone.stdout and alone.returncode == 1
    assert project.processes() == []


def test_commands_work_when_nothing_runs(project: LaunchedProject):
    status = project.launch("status")
    assert status.returncode == 3 and "not running" in status.stdout
    stop = project.launch("stop")
    assert stop.returncode == 0 and "not running" in stop.stdout
    logs = project.launch("logs")
    assert logs.returncode == 1 and "./launch.sh start" in logs.stdout
    workers = project.launch("workers")
    assert workers.returncode == 0 and "WORKER_HOSTS" in workers.stdout
    wrong = project.launch("begin")
    assert wrong.returncode == 2 and "no command 'begin'" in wrong.stdout and "usage" in wrong.stdout


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"RING_SIZE": "two"}, "RING_SIZE"),
        ({"MODEL_REPO": "/no/such/folder"}, "MODEL_REPO=/no/such/folder"),
        ({"LAYER_SPLIT": "1,2"}, "LAYER_SPLIT"),
        ({"KV_CACHE_RESERVED_MEMORY_MB": "100000000"}, "KV_CACHE_RESERVED_MEMORY_MB"),
        ({"HOSTFILE": "/no/such/file"}, "HOSTFILE"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_start_that_fails_says_why_and_leaves_nothing(project: LaunchedProject, keys: dict[str, str], message: str):
    started = project.launch("start", keys=keys)
    assert started.returncode == 1 and message in started.stdout, started.stdout
    assert project.processes() == []


def test_a_port_in_use_is_named_with_the_key_to_change(project: LaunchedProject):
    with socket.create_server(("127.0.0.1", int(str(project.keys["API_PORT"])))):
        started = project.launch("start")
    assert started.returncode == 1
    assert f"API_PORT={project.keys['API_PORT']}" in started.stdout and f"process {os.getpid()}" in started.stdout
    assert project.processes() == []


def test_a_ring_port_in_use_is_named(project: LaunchedProject):
    port = int(str(project.keys["RING_PORT"])) + 1
    with socket.create_server(("127.0.0.1", port)):
        started = project.launch("start")
    assert started.returncode == 1 and "RING_PORT in .env line 2" in started.stdout, started.stdout
    assert started.stdout.count(f"ring port {port}") == 1 and f"process {os.getpid()}" in started.stdout
    assert project.processes() == []


def test_start_writes_dotenv_from_the_example_once(project: LaunchedProject):
    (project.root / ".env").unlink()
    (project.root / ".env.example").write_text("MODEL_REPO=/no/such/folder  # wrong on purpose\n")
    first = project.launch("start")
    assert "wrote .env" in first.stdout and (project.root / ".env").read_text().startswith("MODEL_REPO")
    assert "wrote .env" not in project.launch("start").stdout


# -- the end of a server that went wrong -----------------------------------------------------------------------------


def test_stop_ends_everything_also_when_every_process_hangs(project: LaunchedProject):
    assert project.launch("start").returncode == 0
    for process in project.processes():
        process.suspend()
    stopped = project.launch("stop")
    assert stopped.returncode == 0 and "stopped" in stopped.stdout, stopped.stdout
    assert project.processes() == []


def test_stop_ends_ranks_that_a_crash_left(project: LaunchedProject):
    """The ranks of a dead api end by themselves; here they cannot."""
    assert project.launch("start").returncode == 0
    ranks = project.ranks()
    for rank in ranks:
        rank.suspend()
    for process in project.processes():
        if process not in ranks:
            process.kill()
    assert project.launch("status").returncode == 3
    assert "earlier run are left" in project.launch("status").stdout
    assert project.launch("stop").returncode == 0
    assert project.processes() == []


def test_start_after_a_crash_ends_what_is_left_and_serves(project: LaunchedProject):
    assert project.launch("start").returncode == 0
    ranks = project.ranks()
    ranks[1].suspend()
    for process in project.processes():
        if process not in ranks:
            process.kill()
    again = project.launch("start")
    assert again.returncode == 0 and "earlier run left" in again.stdout, again.stdout
    assert not {rank.pid for rank in ranks} & {rank.pid for rank in project.ranks()}
    assert project.launch("stop").returncode == 0


def test_an_interrupted_start_leaves_nothing(project: LaunchedProject):
    argv = [str(project.root / "launch.sh"), "start"]
    with subprocess.Popen(
        argv,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits it ignored
    ) as starting:
        deadline = time.monotonic() + 60
        while not project.ranks():
            assert time.monotonic() < deadline and starting.poll() is None
            time.sleep(0.05)
        starting.send_signal(signal.SIGINT)
        said, _ = starting.communicate(timeout=60)
        assert starting.returncode == 130 and b"the server did not start: interrupted\n" in said
    assert project.processes() == []


def test_two_starts_at_once_make_one_server(project: LaunchedProject):
    argv = [str(project.root / "launch.sh"), "start"]
    starts = [
        subprocess.Popen(argv, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = sorted(start.communicate(timeout=120)[0] for start in starts)
    assert [start.returncode for start in starts] == [0, 0], said
    assert sum("ready: tiny at" in text for text in said) == 1
    assert sum("already running (pid" in text and ", ready): http" in text for text in said) == 1, said
    assert len([p for p in project.processes() if p.info["cmdline"][1:3] == ["-m", "api"]]) == 1
    assert project.health()["status"] == "ready"
    assert project.launch("stop").returncode == 0
    assert psutil.pid_exists(os.getpid()) and project.processes() == []
