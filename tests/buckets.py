"""Buckets on this machine: emulators of Cloud Storage and S3, behind a network that fails."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

from tests.several import free_port

BUCKET = "tgeo"


class Answer(NamedTuple):
    """What the network does with a request: seconds of delay, and a status instead of an answer."""

    delay: float = 0.0
    status: int = 0


Policy = Callable[[str, str], Answer]  # of method and path


def well(method: str, path: str) -> Answer:
    """A network without faults."""
    del method, path
    return Answer()


def shaky(seed: int) -> Policy:
    """Every request late, one in thirty refused for now."""
    chance = random.Random(seed)
    lock = threading.Lock()

    def policy(method: str, path: str) -> Answer:
        del method, path
        with lock:
            return Answer(chance.uniform(0, 0.03), 503 if chance.random() < 1 / 30 else 0)

    return policy


class Network:
    """Passes requests on to an emulator, unless its policy says otherwise.

    Args:
        port: of the emulator.
    """

    def __init__(self, port: int):
        self.policy: Policy = well
        self.refused = 0
        network = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                del args

            def pass_on(self) -> None:
                network._pass_on(self, port)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = pass_on

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _pass_on(self, request: http.server.BaseHTTPRequestHandler, port: int) -> None:
        body = _body(request)
        answer = self.policy(request.command, request.path)
        time.sleep(answer.delay)
        if answer.status:
            self.refused += 1
            _reply(request, answer.status, {}, b"")
            return
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in ("transfer-encoding", "expect")
        }
        connection.request(request.command, request.path, body, headers)
        found = connection.getresponse()
        content = found.read()
        _reply(request, found.status, dict(found.getheaders()), content)
        connection.close()

    def close(self) -> None:
        self._server.shutdown()


def _body(request: http.server.BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() == "chunked":
        parts = []
        while size := int(request.rfile.readline().split(b";")[0], 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        request.rfile.readline()
        return b"".join(parts)
    return request.rfile.read(int(request.headers.get("Content-Length", 0)))


def _reply(request, status: int, headers: dict[str, str], content: bytes) -> None:
    request.send_response(status)
    for name, value in headers.items():
        if name.lower() not in ("content-length", "transfer-encoding", "connection"):
            request.send_header(name, value)
    length = len(content)
    if request.command == "HEAD":
        length = int(headers.get("Content-Length", headers.get("content-length", 0)))
    request.send_header("Content-Length", str(length))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


@contextlib.contextmanager
def emulated(scheme: str) -> Iterator[tuple[Network, dict[str, str]]]:
    """A bucket named `BUCKET`, the network before it, and the environment that leads there."""
    if scheme == "gs":
        port = free_port()
        server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
        server.start()
        stop = server.stop
    else:
        server = ThreadedMotoServer("127.0.0.1", port := free_port())
        server.start()
        stop = server.stop
        made = http.client.HTTPConnection("127.0.0.1", port)
        made.request("PUT", f"/{BUCKET}")
        assert made.getresponse().status == 200
    network = Network(port)
    try:
        yield network, _environment(scheme, network.url)
    finally:
        network.close()
        stop()


def _environment(scheme: str, url: str) -> dict[str, str]:
    if scheme == "gs":
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "FSSPEC_GCS": '{"token": "anon"}',
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_CLOUD_PROJECT": "none",
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
