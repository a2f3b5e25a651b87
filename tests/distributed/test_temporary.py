"""The temporary folder of a rank: made once, used again, and never one that somebody else prepared."""

import os
import tempfile
from pathlib import Path

import pytest

from distributed.temporary import use_private_temporary_folder


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What /tmp is: a folder in which everybody may make others."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def used_within(shared: Path) -> Path:
    os.environ["TMPDIR"], tempfile.tempdir = str(shared), None
    use_private_temporary_folder()
    assert tempfile.gettempdir() == os.environ["TMPDIR"]
    return Path(os.environ["TMPDIR"])


def test_it_is_the_user_s_alone_and_the_same_each_time(shared: Path):
    folder = used_within(shared)
    assert folder.parent == shared and folder.stat().st_mode & 0o777 == 0o700
    assert used_within(shared) == folder


@pytest.mark.parametrize("trap", ["a link", "a link to nothing", "a file", "open to all"])
def test_one_that_was_prepared_is_not_used(shared: Path, trap: str):
    expected = shared / f"mlx-ring-server-{os.getuid()}"
    if trap == "a link":
        (shared / "theirs").mkdir()
        expected.symlink_to(shared / "theirs")
    elif trap == "a link to nothing":
        expected.symlink_to(shared / "gone")
    elif trap == "a file":
        expected.touch()
    else:
        expected.mkdir()
        expected.chmod(0o777)
    folder = used_within(shared)
    assert folder != expected and folder.stat().st_mode & 0o777 == 0o700
