"""A Git repository to read from: made of files, and served over HTTP on loopback by git's own backend."""

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

_WHO = {f"GIT_{role}_{fact}": "t@t" for role in ("AUTHOR", "COMMITTER") for fact in ("NAME", "EMAIL")}
_ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", **_WHO}


def git(folder: Path, *arguments: str, given: bytes = b"", **environment: str) -> bytes:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, input=given, check=True, capture_output=True, env={**_ENVIRONMENT, **environment}
    ).stdout


def make_repository(folder: Path) -> Path:
    """An empty repository whose blobs can be left out of a fetch, as those of the large hosts can."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "uploadpack.allowFilter", "true")
    return folder


def commit(repository: Path, files: Mapping[str, bytes | None]) -> str:
    """Write files, or remove those that are None; gives the commit's id."""
    for name, content in files.items():
        path = repository / name
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "A change")
    return git(repository, "rev-parse", "HEAD").decode().strip()


class _Backend(BaseHTTPRequestHandler):
    root: Path

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers["Content-Length"])))

    def _serve(self, body: bytes) -> None:
        parts = urlsplit(self.path)
        asked = {
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": parts.path,
            "QUERY_STRING": parts.query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        head, _, content = git(self.root, "http-backend", given=body, **asked).partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def git_server(root: Path) -> Iterator[str]:
    """Serve the repositories of a folder; gives the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Backend", (_Backend,), {"root": root})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
