"""distributed/environment.sh: a Python is found, and an environment is complete or made again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "distributed" / "environment.sh"


def run_sh(
    script: str, *arguments: object, path: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `script` after sourcing environment.sh; `path` becomes PATH's first folder, and with it the only Pythons."""
    env = {**os.environ, "HOME": "/nowhere", **environ}
    env.pop("PYTHON", None)
    if path is not None:
        env["PATH"] = str(path)
    return subprocess.run(
        ["/bin/sh", "-c", f'. "$0"; {script}', str(SCRIPT), *map(str, arguments)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def make_programs(folder: Path, *, python: str) -> Path:
    """A PATH folder: the tools the script uses, and a python3 that is the shell text `python`."""
    folder.mkdir()
    for name in ("cat", "rm", "mkdir", "uname", "cmp", "sleep", "grep", "cp"):
        (folder / name).symlink_to(next(p for p in (Path("/usr/bin") / name, Path("/bin") / name) if p.exists()))
    (folder / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "python3").chmod(0o755)
    return folder


def test_the_first_python_that_is_new_enough_is_taken(tmp_path: Path):
    programs = make_programs(tmp_path / "bin", python="exit 1")
    (programs / "python3.12").symlink_to(sys.executable)
    found = run_sh("find_python", path=programs)
    assert found.returncode == 0 and found.stdout.strip() == str(programs / "python3.12")


def test_without_a_new_enough_python_it_says_how_to_get_one(tmp_path: Path):
    programs = make_programs(tmp_path / "bin", python='[ "$1" = --version ] && echo Python 3.9.6; exit 1')
    lock = tmp_path / "requirements.lock"
    lock.write_text("# nothing\n")
    # Homebrew's and other fixed folders may hold a good Python on the machine that runs this.
    script = 'find_python() { return 1; }; make_environment "$1" "$2"'
    made = run_sh(script, tmp_path, lock, path=programs)
    assert made.returncode != 0
    assert "Python 3.11 to 3.14" in made.stderr and "Python 3.9.6" in made.stderr and "uv" in made.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.ring
def test_an_interrupted_install_is_made_again_and_a_finished_one_is_left_alone(tmp_path: Path):
    root = tmp_path / "a folder"
    root.mkdir()
    lock = root / "requirements.lock"
    lock.write_text("# no package at all\n")

    def make() -> str:
        made = run_sh('python=mine venv=mine; make_environment "$1" "$2" && echo $python $venv >&2', root, lock)
        assert made.returncode == 0 and made.stderr == "mine mine\n", "it changes no variable of launch.sh's"
        return made.stdout

    assert "making" in make()
    assert make() == ""
    planted = root / ".venv" / "planted"
    planted.touch()
    lock.write_text("# another lock\n")
    assert "installing" in make() and planted.exists(), "a new lock is installed into the environment"
    (root / ".venv" / ".installing").touch()
    assert "making" in make() and not planted.exists(), "what an interrupted install left is not built upon"
    assert make() == ""
    (root / ".venv" / "bin" / "python").unlink()
    assert not is_complete(root, lock), "its Python is gone"


@pytest.mark.ring
def test_a_failed_install_is_not_taken_for_finished(tmp_path: Path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("no-such-package-of-ours==0\n")
    made = run_sh('make_environment "$1" "$2"', tmp_path, lock, PIP_NO_INDEX="1")
    assert made.returncode != 0 and "no-such-package-of-ours" in made.stderr
    assert not is_complete(tmp_path, lock)


def is_complete(root: Path, lock: Path) -> bool:
    return run_sh('venv=$1/.venv; shift; is_complete "$@"', root, lock).returncode == 0


def test_the_lock_of_an_install_that_died_is_taken_over(tmp_path: Path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "installing").mkdir()
    (tmp_path / "installing" / "pid").write_text(str(ended.pid))
    taken = run_sh('take_install_lock "$1" && cat "$1/installing/pid"; echo $$', tmp_path)
    first, second = taken.stdout.split()
    assert first == second
