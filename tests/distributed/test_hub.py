"""Models from the Hub: huggingface_hub's own client against a stand-in server on the loopback, in processes of its own
because it reads its environment when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.hub_server import HubServer
from tests.distributed.model_folders import weight_files, write_folder

REPO = "tiny/llama"
PROJECT = Path(__file__).parents[2]

USE_STAGE = """
import json, sys
from pathlib import Path
from distributed.errors import ModelError
from distributed.model_files import ensure_weights, inspect_model, prepare_model
from distributed.partition import LayerRange
repo, start, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
messages = []
try:
    path = prepare_model(repo, Path(sys.argv[4]), progress=messages.append)
    info = inspect_model(path)
    ensure_weights(info, LayerRange(start, end), start == 0, end == info.num_layers, messages.append)
    here = [file.name for file in info.weight_files if info.has_file(file)]
    files = {file.name: file.total_bytes for file in info.weight_files}
    print(json.dumps(dict(path=str(path), repo=info.repo, here=here, files=files, layer_bytes=info.layer_bytes,
                          messages=messages)))
except ModelError as error:
    print(json.dumps(dict(error=str(error))))
"""


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "served", hidden_size=128)  # files larger than the 100 kB that a header request takes
    return tmp_path / "served"


def use_stage(tmp_path: Path, url: str, start: int, end: int, repo: str = REPO) -> dict:
    """Prepares the model and the files of stage [start, end) as a rank does; `tmp_path` holds its cache."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", USE_STAGE, repo, str(start), str(end), str(tmp_path / "root")]
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_stage_downloads_only_the_files_that_hold_it(folder, tmp_path):
    with HubServer(folder, REPO) as hub:
        used = use_stage(tmp_path, hub.url, 2, 4)
    files = weight_files(folder)
    assert (used["repo"], used["here"]) == (REPO, files[2:])
    for name in files[2:]:
        assert (Path(used["path"]) / name).read_bytes() == (folder / name).read_bytes()
        assert hub.bytes_sent(name) > used["files"][name]
    for name in files[:2]:
        assert 0 < hub.bytes_sent(name) <= 100_001 < used["files"][name]  # its header, by a range request
    assert len(set(used["layer_bytes"])) == 1
    assert any(f"{files[3]} of {REPO} (file 2 of 2" in message for message in used["messages"])
    assert any(message.endswith("100 %") for message in used["messages"])


def test_a_second_start_works_without_the_network(folder, tmp_path):
    with HubServer(folder, REPO) as hub:
        first = use_stage(tmp_path, hub.url, 0, 2)
    assert use_stage(tmp_path, hub.url, 0, 2)["here"] == first["here"]


def test_a_second_start_reads_no_header_again(folder, tmp_path):
    with HubServer(folder, REPO) as hub:
        use_stage(tmp_path, hub.url, 0, 2)
        before = list(hub.sent)
        use_stage(tmp_path, hub.url, 0, 2)
        assert hub.sent == before


def test_another_stage_on_the_same_machine_fetches_what_it_lacks(folder, tmp_path):
    with HubServer(folder, REPO) as hub:
        use_stage(tmp_path, hub.url, 0, 1)
        assert use_stage(tmp_path, hub.url, 3, 4)["here"] == [weight_files(folder)[0], weight_files(folder)[3]]


def test_a_repository_that_does_not_exist_is_named(folder, tmp_path):
    with HubServer(folder, REPO) as hub:
        used = use_stage(tmp_path, hub.url, 0, 4, repo="tiny/lama")
    assert "MODEL_REPO=tiny/lama is neither a folder here nor a repository" in used["error"]
    assert "CONFIG_FILE" not in used["error"]


def test_what_may_be_a_short_name_is_told_where_those_are_listed(folder, tmp_path):
    with HubServer(folder, REPO) as hub:
        used = use_stage(tmp_path, hub.url, 0, 4, repo="qwen3-4b")
    assert used["error"].endswith("If it is meant as a short name: no CONFIG_FILE that is set lists it.")


def test_a_repository_of_pickles_is_refused(folder, tmp_path):
    (folder / "model.safetensors.index.json").unlink()
    for name in weight_files(folder):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with HubServer(folder, REPO) as hub:
        used = use_stage(tmp_path, hub.url, 0, 4)
    assert "has no safetensors weights (pickle files such as .bin are not loaded" in used["error"]
    assert hub.bytes_sent("pytorch_model.bin") == 0


def test_a_hub_that_cannot_be_reached_says_so(folder, tmp_path):
    with HubServer(folder, REPO) as hub:
        pass
    used = use_stage(tmp_path, hub.url, 0, 4)
    assert f"{REPO} could not be fetched from {hub.url}" in used["error"]
    assert "check the network" in used["error"]
