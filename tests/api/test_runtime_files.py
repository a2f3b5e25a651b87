import json
import subprocess
import sys
from pathlib import Path

import pytest

from api.runtime_files import API_FILE, AlreadyRunning, lock_port, only_server_of, write_json
from tests.ports import free_ports


def test_one_server_a_folder_and_its_files_go_with_it(tmp_path: Path):
    folder = tmp_path / ".run"
    with only_server_of(folder):
        write_json(folder / API_FILE, {"pid": 1})
        assert json.loads((folder / API_FILE).read_text()) == {"pid": 1}
        with pytest.raises(AlreadyRunning), only_server_of(folder):
            pass
        assert (folder / API_FILE).exists()  # the one that was refused takes nothing away
    assert not (folder / API_FILE).exists()
    with only_server_of(folder):
        pass


def test_a_server_that_was_killed_holds_no_lock(tmp_path: Path):
    code = "import os, sys; from pathlib import Path; from api.runtime_files import only_server_of\n"
    code += "with only_server_of(Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    with only_server_of(tmp_path):
        pass


def test_a_port_is_one_server_s_until_it_ends():
    port = free_ports(1)
    with lock_port(port):
        with pytest.raises(AlreadyRunning, match=str(port)):
            lock_port(port)
        lock_port(free_ports(1)).close()
    lock_port(port).close()
