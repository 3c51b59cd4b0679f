"""A real HTTP server on 127.0.0.1, in a thread, whose answers a test gives."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    body: Any
    time: float


class Answer(NamedTuple):
    """Another answer than JSON with status 200; a body in parts is sent part by part, without its length."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


class Server:
    """Answers POST by ``answer(body)``: a JSON value or an Answer. Keeps the requests and how many ran at once.

    Port 0 is any that is free.
    """

    def __init__(self, answer: Callable[[Any], Any], port: int = 0):
        self.requests: list[Request] = []
        self.peak = 0
        self.sent = 0  # bytes of bodies
        self._answer = answer
        self._running = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server._handle(self, body)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *args):  # a client that hangs up is what some tests are about
                pass

        self._server = Quiet(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def serve_forever(self):
        """Until Ctrl-C."""
        with suppress(KeyboardInterrupt):
            self._server.serve_forever()

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler, body):
        with self._lock:
            self.requests.append(Request(handler.path, dict(handler.headers), body, time.monotonic()))
            self._running += 1
            self.peak = max(self.peak, self._running)
        try:
            answer = self._answer(body)
        finally:
            with self._lock:
                self._running -= 1  # before it is sent: the client may ask the next thing at once
        if not isinstance(answer, Answer):
            answer = Answer(body=json.dumps(answer).encode())
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        whole = isinstance(answer.body, bytes)
        handler.send_header("Content-Length" if whole else "Connection", str(len(answer.body)) if whole else "close")
        handler.end_headers()
        for part in [answer.body] if whole else answer.body:
            handler.wfile.write(part)
            self.sent += len(part)
