"""The system's ssh, as this machine uses it to reach the others: never with a prompt, and noticing a dead line.

`ssh_options` is the one place that says how we connect; `write_ssh_shim` makes mlx.launch, which calls plain `ssh`,
connect the same way. Called by hosts, launch and workers; holds no policy about what runs there.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from distributed.errors import HostAway, HostError

if TYPE_CHECKING:
    from config import Settings

CONNECT_TIMEOUT_S = 10
# A host that stops answering is given up after INTERVAL x COUNT seconds; ssh alone would wait for hours.
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
SSH_FAILED = 255  # ssh's own exit code, told apart from those of what it runs


def ssh_options(settings: Settings, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> list[str]:
    """Options of every ssh call. ssh keeps the first value it reads, so SSH_OPTIONS win over all but BatchMode."""
    defaults = {
        "ConnectTimeout": f"{connect_timeout_s:.0f}",
        "ServerAliveInterval": KEEPALIVE_INTERVAL_S,
        "ServerAliveCountMax": KEEPALIVE_COUNT,
    }
    options = ["-o", "BatchMode=yes", *shlex.split(settings.ssh_options)]
    for name, value in defaults.items():
        options += ["-o", f"{name}={value}"]
    return options


def find_ssh() -> str:
    """The path of the system's ssh. HostError where there is none."""
    path = shutil.which("ssh")
    if path is None:
        raise HostError("WORKER_HOSTS needs the ssh client, and this machine has none: install openssh-client")
    return path


def ssh_argv(settings: Settings, target: str, command: str, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> list[str]:
    """The argv that runs `command` in the login shell of `target`."""
    return [find_ssh(), *ssh_options(settings, connect_timeout_s), "-T", target, command]


def script_as_input(script: str) -> bytes:
    """A POSIX shell script as the stdin of `sh -s`: no limit of length, nothing for `ps` to show, any login shell."""
    # The braces make sh read all of the script before it runs any of it: its commands may read stdin.
    return f"{{\n{script}\nexit\n}}\n".encode()


def run_script(
    settings: Settings, target: str, script: str, *, timeout_s: float, connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a POSIX shell script on `target` and wait for it.

    Raises:
        HostAway: ssh could not get there, or it took longer than `timeout_s`.
    """
    argv = ssh_argv(settings, target, "sh -s", connect_timeout_s)
    return run_on(target, argv, script_as_input(script), timeout_s)


def run_on(target: str, argv: list[str], stdin: bytes, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `argv`, an ssh call for `target`. Raises HostAway as `run_script` does."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise HostAway(f"{target}: did not answer within {timeout_s:.0f} s; try `ssh {target}` by hand") from error
    stdout, stderr = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    if done.returncode == SSH_FAILED:
        raise HostAway(_ssh_failure(target, stderr))
    return subprocess.CompletedProcess(argv, done.returncode, stdout, stderr)


def _ssh_failure(target: str, stderr: str) -> str:
    said = " ".join(stderr.split())
    mends = {
        "Permission denied": f"it does not let this machine in without a password: ssh-copy-id {target}",
        "Host key verification failed": f"its key is not known here: run `ssh {target}` once and confirm it",
        "Could not resolve": "its name is not known here: correct WORKER_HOSTS",
        "Connection refused": "no ssh server runs there: switch on Remote Login (macOS: System Settings, General,"
        " Sharing) or install openssh-server",
        "No route to host": "it is not reachable: check cable and address; on macOS allow the terminal under System"
        " Settings, Privacy & Security, Local Network",
        "timed out": "it does not answer: check that it is on and its address right",
    }
    mend = next((mend for sign, mend in mends.items() if sign in said), f"ssh failed; try `ssh {target}` by hand")
    return f"{target}: {mend} (ssh: {said or 'no message'})"


def write_ssh_shim(settings: Settings, folder: Path) -> Path:
    """Write `folder`/ssh, which runs the real ssh with our options; the caller puts `folder` first on PATH.

    Only the calls that start a rank (`ssh -tt …`) get through. mlx.launch makes another one to kill it, with `rm` of
    the first line that its ssh printed: where a login script greets, the words of that, which sh may take for
    patterns of files in the home folder (and else a name that ends in the terminal's CR, so it never finds the
    rank). Ranks end with their ssh, and `end_on_workers` sees to the rest.

    stdin comes from /dev/null: mlx.launch selects on the writable stdin of its children and so spins a whole core as
    long as they hold it open. Once it is closed, the newline that the api writes ends the spinning (DESIGN 9c).
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join([find_ssh(), *ssh_options(settings)])
    partial = folder / "ssh.partial"
    partial.write_text(f'#!/bin/sh\n[ "$1" = -tt ] || exit 0\nexec {command} "$@" </dev/null\n')
    partial.chmod(0o755)
    partial.replace(folder / "ssh")
    return folder


def quote_remote_path(path: str) -> str:
    """`path` for a shell on another machine; a leading ~/ and a relative path mean the home folder there."""
    if path.startswith("/"):
        return shlex.quote(path)
    return '"$HOME"/' + shlex.quote(path.removeprefix("~").lstrip("/"))
