"""Checks of the other machines before a ring is started on them: can each take part, and does each reach the next one?

`check_workers` asks, compares and reports, and never changes anything on a machine (distributed.bring does that). Every
failure is a line that names the host and the mend. Called by the command line's start, workers and plan.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import worker_probe
from distributed.errors import HostError
from distributed.hosts import RankHost, worker_targets
from distributed.ssh import quote_remote_path, run_on, run_script, ssh_argv
from distributed.version import MUST_AGREE, code_hash

if TYPE_CHECKING:
    from config import Settings

ANSWER_TIMEOUT_S = 60.0
LINK_TIMEOUT_S = 10.0
SLOW_LINK_BYTES_PER_S = 50e6  # half of what a gigabit cable carries
NO_PYTHON = 71  # exit code of our script

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT_SCRIPT = Path(__file__).with_name("environment.sh")
BRING = "run ./launch.sh workers"

Report = Callable[[str], None]
Facts = dict[str, Any]


@dataclass(frozen=True)
class WorkerModel:
    """The model as far as the worker hosts need to know it."""

    repo: str
    folder: Path | None  # here, and to be brought to the workers; None: each worker gets it from the hub
    size_bytes: int  # of all weights

    @property
    def brought_to(self) -> str:
        """Where it lies on a worker, from WORKER_DIR."""
        return f"models/{self.folder.name}" if self.folder else ""

    @property
    def places(self) -> list[str]:
        """Where a rank on a worker looks for the folder, in its order (`prepare_model`); the embedded model is only
        ever in a server's own models/."""
        if self.folder is None:
            return []
        return [self.brought_to] if self.repo.startswith("builtin") else [self.brought_to, self.repo]


def check_workers(
    settings: Settings, hosts: Sequence[RankHost], model: WorkerModel | None, report: Report, *, with_links: bool = True
) -> dict[str, Facts]:
    """Check every worker and every link; HostError lists all failures, one a line. Returns each worker's facts.

    `with_links=False` while a ring has the ports.
    """
    targets = worker_targets(hosts)
    with ThreadPoolExecutor(max_workers=max(1, len(targets))) as pool:
        answers = list(pool.map(partial(_try_to_ask_facts, settings, model=model), targets))
    failures: list[str] = []
    for target, answer in zip(targets, answers, strict=True):
        found = [answer] if isinstance(answer, str) else _differences(target, answer, model, len(hosts))
        failures += found
        if not found and isinstance(answer, dict):
            gigabytes = answer["free_bytes"] / 1e9
            report(f"{target}: python {answer['python']}, same versions, {gigabytes:.0f} GB of disk free")
            if answer["system"] == "Linux" and not answer["has_openblas"]:
                report(f"{target}: has no OpenBLAS, which makes it slow: install libopenblas0 there")
    if failures:
        raise HostError("\n".join(failures))
    if with_links:
        check_links(settings, hosts, report)
    return {target: answer for target, answer in zip(targets, answers, strict=True) if isinstance(answer, dict)}


def ask_facts(settings: Settings, target: str, model: WorkerModel | None) -> Facts:
    """What `target` says about itself (see worker_probe.facts). HostError when it cannot be asked."""
    names = sorted({*MUST_AGREE[1:], *pinned_versions()})
    return _ask(settings, target, {"ask": "facts", "package_names": names, "model_paths": _model_paths(model)})


def pinned_versions() -> dict[str, tuple[str, str | None]]:
    """Every package of requirements.lock: its version, and the system (as platform.system()) it is for or None."""
    pins: dict[str, tuple[str, str | None]] = {}
    for line in (PACKAGE_ROOT / "requirements.lock").read_text().splitlines():
        if match := re.match(r'([\w.-]+)==([^\s;]+)(?:\s*;\s*platform_system\s*==\s*"(\w+)")?', line):
            pins[match[1]] = (match[2], match[3])
    return pins


def missing_files(model: WorkerModel, facts: Facts) -> list[str]:
    """The files of the model's folder that a worker lacks or has others of, in the folder that a rank there takes."""
    if model.folder is None:
        return []
    wanted = worker_probe.files_of(model.folder)
    there = next((files for place in model.places if (files := facts["models"].get(place))), {})
    return [name for name, file in wanted.items() if there.get(name) != file]


def check_links(settings: Settings, hosts: Sequence[RankHost], report: Report) -> None:
    """Let every rank listen on its ring port and connect to the next one, all at once; HostError names who cannot."""
    if not worker_targets(hosts):
        return
    tokens = [secrets.token_hex(8) for _ in hosts]

    def ask_link(host: RankHost) -> dict[str, Any]:
        following = hosts[(host.rank + 1) % len(hosts)]
        question: dict[str, Any] = {
            "listen": (host.address, host.ports[0]),
            "connect": (following.address, following.ports[0]),
            "previous_token": tokens[host.rank - 1],
            "own_token": tokens[host.rank],
            "timeout_s": LINK_TIMEOUT_S,
        }
        return (
            worker_probe.link(**question) if host.ssh is None else _ask(settings, host.ssh, {"ask": "link", **question})
        )

    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        results = list(pool.map(ask_link, hosts))
    if failures := _link_failures(hosts, results):
        raise HostError("\n".join(failures))
    for host, result in zip(hosts, results, strict=True):
        following = hosts[(host.rank + 1) % len(hosts)]
        if host.ssh == following.ssh:
            continue
        speed = result["bytes_per_s"]
        report(f"link {host.name} -> {following.name}: {result['latency_ms']:.2f} ms, {speed / 1e6:.0f} MB/s")
        if speed < SLOW_LINK_BYTES_PER_S:
            report(
                f"  slow: long prompts will wait for this link. A cable or Thunderbolt carries more than Wi-Fi: give"
                f" the address of its interface in {'RING_HOST' if host.is_local else 'WORKER_HOSTS'}"
            )


# -- asking ----------------------------------------------------------------------------------------------------------


def _ask(settings: Settings, target: str, question: dict[str, Any]) -> dict[str, Any]:
    probe = Path(worker_probe.__file__).read_text()
    script = f"""{ENVIRONMENT_SCRIPT.read_text()}
folder={quote_remote_path(settings.worker_dir)}
python=$folder/.venv/bin/python
"$python" -c '' 2>/dev/null || python=$(find_python) || {{ explain_no_python; exit {NO_PYTHON}; }}
exec "$python" -c {shlex.quote(probe)} "$folder" {shlex.quote(json.dumps(question))} </dev/null
"""
    done = run_script(settings, target, script, timeout_s=ANSWER_TIMEOUT_S)
    said = done.stderr.strip() or done.stdout.strip() or "it printed nothing"
    if done.returncode != 0:
        raise HostError(f"{target}: {said}")
    # What a login script prints comes before or after it.
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(answer := json.loads(line), dict):
                return answer
    raise HostError(
        f"{target}: its login shell ends before it runs what ssh sends ({said}): look for exit or exec in ~/.bashrc or"
        " ~/.zshenv there"
    )


def _try_to_ask_facts(settings: Settings, target: str, model: WorkerModel | None) -> Facts | str:
    try:
        facts = ask_facts(settings, target, model)
        check_login_shell(settings, target)
        return facts
    except HostError as error:
        return str(error)


def check_login_shell(settings: Settings, target: str) -> None:
    """mlx.launch sends its script to the login shell, in a form that bash and zsh understand. HostError for others."""
    sent = '[[ -d / ]] && cmd=(echo fine); "${cmd[@]}"'
    done = run_on(target, ssh_argv(settings, target, sent), b"", ANSWER_TIMEOUT_S)
    if "fine" not in done.stdout:
        raise HostError(f"{target}: its login shell is neither bash nor zsh, which mlx.launch needs: chsh -s /bin/bash")


# -- comparing -------------------------------------------------------------------------------------------------------


def _model_paths(model: WorkerModel | None) -> list[str]:
    if model is None:
        return []
    if model.folder is not None:
        return [*model.places, f"{model.brought_to}.partial"]
    return [_hub_folder(model.repo)]


def _hub_folder(repo: str) -> str:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return f"{os.environ.get('HF_HUB_CACHE', home + '/hub')}/models--{repo.replace('/', '--')}"


def _differences(target: str, facts: Facts, model: WorkerModel | None, world_size: int) -> list[str]:
    """What keeps this worker from taking part, one message each; empty when nothing does."""
    if facts["code"] is None:
        return [f"{target}: our code is not there yet: {BRING}"]
    found: list[str] = []
    if facts["code"] != code_hash():
        found.append(f"{target}: has other code than this machine ({facts['code']}, here {code_hash()}): {BRING}")
    for name in MUST_AGREE[1:]:
        here, there = metadata.version(name), facts["packages"].get(name)
        if there != here:
            found.append(f"{target}: {name} is {there or 'not installed'}, here it is {here}: {BRING}")
    if model is not None:
        found += _model_differences(target, facts, model, world_size)
    return found


def _model_differences(target: str, facts: Facts, model: WorkerModel, world_size: int) -> list[str]:
    if model.folder is not None:
        missing = missing_files(model, facts)
        return (
            [f"{target}: lacks the model {model.folder.name}, or has another one ({len(missing)} files): {BRING}"]
            if missing
            else []
        )
    files = facts["models"][_hub_folder(model.repo)]
    present = sum(size for name, (size, _) in files.items() if name.startswith("blobs/"))
    needed = model.size_bytes // world_size - present
    if needed <= facts["free_bytes"]:
        return []
    return [
        f"{target}: about {needed / 1e9:.0f} GB of {model.repo} are to be downloaded there and its disk has"
        f" {facts['free_bytes'] / 1e9:.0f} GB free: make room, or set HF_HOME to a larger disk"
    ]


def _link_failures(hosts: Sequence[RankHost], results: Sequence[dict[str, Any]]) -> list[str]:
    """One message each, without those that only tell of a neighbour's failure, which its own says better: of a rank
    that waited for it in vain, or called where it could not listen."""
    kinds = [result.get("error") for result in results]
    failures: list[tuple[str, bool]] = []
    for host, result in zip(hosts, results, strict=True):
        following = hosts[(host.rank + 1) % len(hosts)]
        if failure := _link_failure(host, following, result):
            echoes = kinds[host.rank] == "accept" or (
                kinds[host.rank] == "connect" and kinds[following.rank] == "listen"
            )
            failures.append((failure, echoes))
    return [failure for failure, echoes in failures if not echoes] or [failure for failure, _ in failures]


def _link_failure(host: RankHost, following: RankHost, result: dict[str, Any]) -> str | None:
    kind, reason = result.get("error"), result.get("reason")
    if kind == "listen" and reason == "in use":
        return (
            f"{host.name}: port {host.ports[0]} is in use there: stop what uses it (./launch.sh stop for a server of"
            " ours), or set another RING_PORT"
        )
    if kind == "listen":
        return (
            f"{host.name}: cannot listen on {host.address}:{host.ports[0]} ({reason}): check its address in"
            " WORKER_HOSTS, RING_HOST or HOSTFILE"
        )
    if kind == "connect":
        return (
            f"{host.name}: cannot connect to {following.name} at {following.address}:{following.ports[0]} ({reason}):"
            " check firewalls and that both are on one network; on macOS allow Local Network for the terminal and sshd"
        )
    if kind == "control":
        return (
            f"{host.name}: {following.name} lets it in at the ring's port {following.ports[0]}, and not at one that the"
            f" system chose ({reason}), as control connections need: let the firewall there take all ports from the"
            " ring's machines"
        )
    return f"{host.name}: {reason}" if kind else None
