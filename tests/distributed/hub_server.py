"""A stand-in for the Hugging Face Hub on the loopback: serves one folder as one commit of a model repository.

It speaks what huggingface_hub needs (revision, tree, resolve with HEAD and ranges), so that its real client runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Use as a context manager. `sent` holds (path, bytes) of every file answer to a GET."""

    def __init__(self, folder: Path, repo_id: str):
        self.folder, self.repo_id = folder, repo_id
        self.sent: list[tuple[str, int]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def bytes_sent(self, name: str) -> int:
        return sum(size for path, size in self.sent if path == name)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer()

            def do_HEAD(self) -> None:
                self._answer()

            def _answer(self) -> None:
                path = urlparse(self.path).path
                files = sorted(file for file in hub.folder.iterdir() if file.is_file())
                if re.fullmatch(rf"/api/models/{hub.repo_id}(/revision/[^/]+)?", path):
                    siblings = [{"rfilename": file.name} for file in files]
                    self._json({"id": hub.repo_id, "sha": COMMIT, "siblings": siblings})
                elif re.fullmatch(rf"/api/models/{hub.repo_id}/tree/[^/]+", path):
                    self._json([self._tree_entry(file) for file in files])
                elif (found := re.fullmatch(rf"/{hub.repo_id}/resolve/[^/]+/([^/]+)", path)) and (
                    hub.folder / found[1]
                ).is_file():
                    self._file(hub.folder / found[1])
                else:
                    known = path.startswith(f"/{hub.repo_id}/")
                    self._send(404, b"", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

            @staticmethod
            def _tree_entry(file: Path) -> dict:
                return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _blob_id(file)}

            def _file(self, file: Path) -> None:
                body, status, headers = file.read_bytes(), 200, {"Accept-Ranges": "bytes"}
                if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    start, end = int(found[1]), min(int(found[2] or len(body) - 1), len(body) - 1)
                    headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                    body, status = body[start : end + 1], 206
                if self.command == "GET":
                    hub.sent.append((file.name, len(body)))
                self._send(status, body, {**headers, "ETag": f'"{_blob_id(file)}"', "X-Repo-Commit": COMMIT})

            def _json(self, value: object) -> None:
                self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def _blob_id(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
