"""A bucket on loopback: lists and gives objects as S3 does, a few to a page, and checks no signature."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PAGE = 2


class BucketServer(ThreadingHTTPServer):
    """Objects by key, each bucket the same; `got` are the keys that were downloaded."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.got: list[str] = []
        self.refuses = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: BucketServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path.lstrip("/")).partition("/")[2]
        if self.server.refuses:
            self._send(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        elif not key:
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            self._send(200, self._listing(query.get("prefix", ""), query.get("continuation-token", "")))
        elif key in self.server.objects:
            self.server.got.append(key)
            body = self.server.objects[key]
            self._send(200, body, {"ETag": etag_of(body), "Last-Modified": "Sat, 28 Nov 2026 12:00:00 GMT"})
        else:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _listing(self, prefix: str, after: str) -> bytes:
        keys = sorted(key for key in self.server.objects if key.startswith(prefix) and key > after)
        page, more = keys[:_PAGE], len(keys) > _PAGE
        objects = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-28T12:00:00.000Z</LastModified>"
            f"<ETag>{escape(etag_of(self.server.objects[key]))}</ETag><Size>{len(self.server.objects[key])}</Size></Contents>"
            for key in page
        )
        following = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>papers</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount><MaxKeys>{_PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{following}{objects}</ListBucketResult>"
        )
        return body.encode()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def etag_of(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    with BucketServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
