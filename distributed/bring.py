"""Brings the worker hosts what they need: our code, its environment and, where it is a folder here, the model.

Everything arrives beside its place and is renamed when it is whole, so an interrupted transfer is never taken for a
finished one; what is there already is not sent again. Called by `./launch.sh workers`; distributed.workers checks.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from distributed import worker_probe
from distributed.errors import HostError
from distributed.model_files import BROUGHT
from distributed.ssh import quote_remote_path, run_script, script_as_input, ssh_argv
from distributed.version import code_hash
from distributed.workers import (
    ENVIRONMENT_SCRIPT,
    PACKAGE_ROOT,
    Facts,
    Report,
    WorkerModel,
    ask_facts,
    check_login_shell,
    missing_files,
    pinned_versions,
)

if TYPE_CHECKING:
    from config import Settings

CODE = ("config", "distributed", "server", "requirements.lock")  # what a rank runs
TRANSFER_STEP_TIMEOUT_S = 120.0


def bring_to_worker(settings: Settings, target: str, model: WorkerModel | None, report: Report) -> None:
    """Make `target` able to take part. HostError says what failed; running it again goes on where it stopped."""
    facts = ask_facts(settings, target, model)
    check_login_shell(settings, target)  # it also reads what brings the code
    if facts["code"] == code_hash():
        report(f"{target}: code is up to date")
    else:
        bring_code(settings, target)
        report(f"{target}: code brought to {settings.worker_dir}")
    if _environment_matches(facts):
        report(f"{target}: environment is up to date")
    else:
        make_environment(settings, target, report)
    if model is not None and model.folder is not None:
        bring_model(settings, target, model, facts, report)


def bring_code(settings: Settings, target: str) -> None:
    """Send the packages and swap them for those that are there, each with one rename."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for part in CODE:
            archive.add(PACKAGE_ROOT / part, part, filter=_plain_member)
    parts = " ".join(CODE)
    script = f"""set -e
folder={quote_remote_path(settings.worker_dir)}
mkdir -p "$folder"
cd "$folder"
if [ ! -e {BROUGHT} ]; then
  for part in {parts}; do
    if [ -e "$part" ]; then
      echo "$folder/$part is not ours to replace: set WORKER_DIR to a folder of its own" >&2
      exit 1
    fi
  done
  : >{BROUGHT}
fi
rm -rf .incoming .outgoing
mkdir .incoming .outgoing
tar -xzf - -C .incoming
for part in {parts}; do
  [ ! -e "$part" ] || mv "$part" .outgoing/
  mv ".incoming/$part" "$part"
done
rm -rf .incoming .outgoing
"""
    _send(settings, target, script, lambda pipe: pipe.write(packed.getvalue()))


def make_environment(settings: Settings, target: str, report: Report) -> None:
    """Install requirements.lock into WORKER_DIR/.venv with the script that launch.sh uses here."""
    script = f"""{ENVIRONMENT_SCRIPT.read_text()}
folder={quote_remote_path(settings.worker_dir)}
make_environment "$folder" "$folder/requirements.lock" 2>&1
"""
    with subprocess.Popen(
        ssh_argv(settings, target, "sh -s"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write(script_as_input(script))
        process.stdin.close()
        last_line = ""
        for line in process.stdout:
            last_line = line.decode(errors="replace").rstrip()
            report(f"{target}: {last_line}")
    if process.returncode != 0:
        raise HostError(
            f"{target}: the environment could not be made there ({last_line}). It needs Python 3.11 to 3.14 and the"
            " package index; mend that and run ./launch.sh workers again"
        )


def bring_model(settings: Settings, target: str, model: WorkerModel, facts: Facts, report: Report) -> None:
    """Send the files of the model's folder that are not there yet, into NAME.partial, and rename it when all are."""
    assert model.folder is not None
    name = model.folder.name
    if not missing_files(model, facts):
        report(f"{target}: model {name} is there")
        return
    files = worker_probe.files_of(model.folder)
    sizes: dict[str, int] = {file: size for file, (size, _) in files.items()}
    arrived = facts["models"].get(f"{model.brought_to}.partial", {})
    to_send = [file for file in files if arrived.get(file) != files[file]]
    needed = sum(sizes[file] for file in to_send)
    if needed > facts["free_bytes"]:
        raise HostError(
            f"{target}: the model {name} needs {needed / 1e9:.1f} GB there and {facts['free_bytes'] / 1e9:.1f} GB are"
            " free: make room, or set WORKER_DIR to a larger disk"
        )
    report(f"{target}: sending model {name}, {needed / 1e9:.2f} GB")
    partial = f"{quote_remote_path(settings.worker_dir)}/{shlex.quote(model.brought_to)}.partial"
    source = model.folder
    _send(
        settings,
        target,
        f"set -e; mkdir -p {partial}; tar -xf - -C {partial}",
        lambda pipe: _write_files(pipe, source, to_send, sizes, lambda text: report(f"{target}: {text}")),
    )
    arrived = ask_facts(settings, target, model)["models"].get(f"{model.brought_to}.partial", {})
    wrong = [file for file in files if arrived.get(file) != files[file]]
    if wrong:
        raise HostError(f"{target}: {wrong[0]} of the model did not arrive whole; run ./launch.sh workers again")
    final = f"{quote_remote_path(settings.worker_dir)}/{shlex.quote(model.brought_to)}"
    swap = f"set -e; rm -rf {final}; mv {partial} {final}"
    done = run_script(settings, target, swap, timeout_s=TRANSFER_STEP_TIMEOUT_S)
    if done.returncode != 0:
        raise HostError(f"{target}: the model could not be put into place: {done.stderr.strip()}")
    report(f"{target}: model {name} brought")


def _environment_matches(facts: Facts) -> bool:
    return all(
        facts["packages"].get(name) == version
        for name, (version, system) in pinned_versions().items()
        if system in (None, facts["system"])
    )


def _plain_member(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in member.name:
        return None
    member.uid = member.gid = 0  # names and numbers of this machine's users mean nothing there
    member.uname = member.gname = ""
    return member


def _write_files(pipe: IO[bytes], folder: Path, names: Iterable[str], sizes: dict[str, int], report: Report) -> None:
    with tarfile.open(fileobj=pipe, mode="w|", dereference=True) as archive:  # a hub snapshot consists of links
        for name in names:
            if sizes[name] > 100e6:
                report(f"{name}, {sizes[name] / 1e9:.2f} GB")
            archive.add(folder / name, name, filter=_plain_member)


def _send(settings: Settings, target: str, script: str, write: Callable[[IO[bytes]], object]) -> None:
    """Run `script` on `target` with what `write` writes as its stdin."""
    argv = ssh_argv(settings, target, f"sh -c {shlex.quote(script)}")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stderr
        try:
            write(process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it failed over there, and says why on stderr
        said = process.stderr.read().decode(errors="replace").strip()
    if process.returncode != 0:
        raise HostError(f"{target}: sending to it failed: {said or f'ssh ended with {process.returncode}'}")
