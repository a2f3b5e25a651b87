"""Nothing that comes from a model's folder or the network is run: read from the code, and tried with such a folder."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

from api.errors import InvalidRequest
from api.tokenizer import ChatTokenizer

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("config", "distributed", "server", "api")
UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch",
    "multiprocessing",
}
RUNNERS = {"eval", "exec", "__import__"}


def test_nothing_of_ours_unpickles_or_runs_text():
    """`mx.eval` is an attribute; Python's own are names. np.load unpickles where it is told to."""
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not UNPICKLERS & {alias.name.split(".")[0] for alias in node.names}, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in UNPICKLERS, where
            elif isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Name) and node.func.id in RUNNERS), where
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), where


@pytest.fixture
def folder_with_code(tiny_chat_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model whose tokenizer is a class of its own, and the file that is there once that code has run."""
    folder = Path(shutil.copytree(tiny_chat_model, tmp_path / "model"))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).touch()\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder, ran


@pytest.mark.parametrize("is_known", [True, False], ids=["a class that transformers has too", "a class of its own"])
def test_code_of_a_tokenizer_runs_only_where_it_is_trusted(folder_with_code: tuple[Path, Path], is_known: bool):
    folder, ran = folder_with_code
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    file.write_text(json.dumps(config if is_known else config | {"tokenizer_class": "Own"}))
    if is_known:
        assert ChatTokenizer(folder).encode_prompt("hello")
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            ChatTokenizer(folder)
    assert not ran.exists()
    ChatTokenizer(folder, trust_remote_code=True)
    assert ran.exists()


def test_a_chat_template_reaches_nothing_of_python(tiny_chat_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_chat_model, tmp_path / "model"))
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    for name in folder.glob("chat_template*"):
        name.unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": escape}))
    with pytest.raises(InvalidRequest, match="unsafe"):
        ChatTokenizer(folder).template.render([{"role": "user", "content": "hello"}])
