"""A server with OpenAI's API on loopback, whose answers a test chooses."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[[str, dict[str, Any]], tuple[int, dict[str, Any], dict[str, str]]]
"""Of the path and the body: status, body and headers."""


def completion(text: str, **more: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return 200, {"choices": [choice], "usage": usage, **more}, {"x-release": "digest-1"}


@contextmanager
def openai_stub(act: Act) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve until the block ends; gives the API's address, and the bodies that came with their headers."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append(body | {"authorization": self.headers.get("authorization")})
            status, answer, headers = act(self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "content-type": "application/json",
                "content-length": str(len(data)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
