"""An HTTP proxy before an S3 server that fails on purpose: errors, resets, stalls, answers lost after the write."""

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a request meets, with its share of all faults.
FAULTS = {"500": 3, "503": 3, "reset": 3, "lost answer": 4, "stall": 1, "slow": 2}
STALL_SECONDS = 2.5  # longer than the clients' timeout in these tests
_ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>on purpose</Message></Error>'


class FaultProxy:
    """`with FaultProxy(target, rate, seed) as proxy:` serves on `proxy.url` what `target` (host, port) does."""

    def __init__(self, target: tuple[str, int], rate: float, seed: int) -> None:
        self.target, self.rate = target, rate
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def choose(self) -> str:
        """The fault of the next request, or "". The order of requests is the only thing the seed leaves open."""
        with self._lock:
            self.requests += 1
            if self._random.random() >= self.rate:
                return ""
            (fault,) = self._random.choices(list(FAULTS), list(FAULTS.values()))
            self.injected[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def _serve(self) -> None:
        body = self._body()
        fault = self.proxy.choose()
        if fault == "reset":
            return self._reset()
        if fault in ("500", "503"):
            code = "InternalError" if fault == "500" else "SlowDown"
            content = _ERROR.format(code=code).encode()
            return self._answer(int(fault), [("Content-Type", "application/xml")], content)
        if fault == "slow":
            time.sleep(0.3)
        if fault == "stall":
            time.sleep(STALL_SECONDS)
            return self._reset()
        status, headers, content, length = self._forward(body)
        if fault == "lost answer":
            return self._reset()
        return self._answer(status, headers, content, length)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes, str | None]:
        connection = HTTPConnection(*self.proxy.target, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k not in ("Transfer-Encoding", "Content-Length", "Expect")}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content, answer.getheader("Content-Length")

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        head = self.command == "HEAD"
        self.send_header("Content-Length", (length or "0") if head else str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def _reset(self) -> None:
        """Close with RST in place of an answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.connection.close()

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # the connection was reset on purpose
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass
