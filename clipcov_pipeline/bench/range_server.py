"""A web server on loopback that answers range requests, each after a delay, and counts what it sends.

It runs in a process of its own, so that what it costs is not the measured process's. GET ``/.sent`` answers
with the counts.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COUNTS = "/.sent"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


class RangeServer:
    """address: ``http://127.0.0.1:PORT``; pid: of the server's process."""

    def __init__(self, address: str, pid: int) -> None:
        self.address, self.pid = address, pid

    def sent(self) -> tuple[int, int]:
        """(requests for content, bytes of content asked for and sent) since the start."""
        with urllib.request.urlopen(self.address + COUNTS) as answer:
            counts = json.load(answer)
        return counts["requests"], counts["bytes"]


@contextmanager
def range_server(folder: Path, latency: float) -> Iterator[RangeServer]:
    """Serve a folder as long as the block runs. latency: seconds before each answer."""
    command = [sys.executable, "-m", __name__, str(folder), str(latency)]
    asked = os.environ.get("no_proxy", "")
    os.environ["no_proxy"] = ",".join(filter(None, [asked, "127.0.0.1"]))  # curl asks a proxy otherwise
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError(f"bench loader: the web server of {folder} ended at its start")
            yield RangeServer(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.stdin.close()  # it ends with its parent, however that ends
            process.wait()
            os.environ["no_proxy"] = asked


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, latency: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency = folder, latency
        self.lock = threading.Lock()
        self.requests = self.bytes = 0
        self.at_work = 0  # answers that are being sent, and are not counted yet


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def do_HEAD(self) -> None:
        self._answer(content=False)

    def do_GET(self) -> None:
        if self.path == COUNTS:
            self._answer_counts()
        else:
            self._answer(content=True)

    def _answer_counts(self) -> None:
        while self.server.at_work:
            time.sleep(0.001)
        body = json.dumps({"requests": self.server.requests, "bytes": self.server.bytes}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, content: bool) -> None:
        time.sleep(self.server.latency)
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        stat = path.stat()
        first, last = 0, stat.st_size - 1
        found = _RANGE.match(self.headers.get("Range", ""))
        if found:
            first, last = int(found[1]), min(int(found[2] or last), last)
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{last}/{stat.st_size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{stat.st_size}-{stat.st_mtime_ns}"')
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if content:
            self._send(path, first, last + 1 - first)

    def _send(self, path: Path, first: int, count: int) -> None:
        with self.server.lock:
            self.server.at_work += 1
        sent = 0
        try:
            with path.open("rb") as file:
                file.seek(first)
                try:
                    self.connection.sendfile(file, first, count)
                finally:
                    sent = file.tell() - first
        except ConnectionError:  # the reader has enough
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.requests += 1
                self.server.bytes += sent
                self.server.at_work -= 1


def main(folder: str, latency: str) -> None:
    """Print the port, and serve until stdin ends."""
    server = _Server(Path(folder), float(latency))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)  # noqa: T201
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
