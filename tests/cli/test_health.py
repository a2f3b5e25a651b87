import socket
import threading
from pathlib import Path

import pytest

from api.cli.health import fetch_health
from api.cli.start import StartFailed, wait_until_ready
from config import Settings

CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"
CUT_503 = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 100\r\n\r\n{"
NOT_OURS = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", CUT, CUT_503, NOT_OURS], ids=["ssh", "nothing", "cut", "cut 503", "list"]
)
def test_an_answer_that_is_none_of_ours_is_no_answer(said: bytes):
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        assert fetch_health(Settings(api_port=listener.getsockname()[1])) is None
        thread.join()


def test_the_end_of_an_api_that_was_started_by_hand_is_told_without_what_it_printed(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        settings = Settings(api_port=unused.getsockname()[1])
        with pytest.raises(StartFailed, match="ended with code -1"):
            wait_until_ready(tmp_path, settings, lambda: -1)
