"""A web server of one folder that answers range requests, or ignores them; counts what it sends."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Sent:
    """Requests and bytes of content since the start; settings of the server."""

    def __init__(self, latency: float, ranges: bool, short: bool) -> None:
        self.requests, self.bytes, self.asked = 0, 0, list[str]()
        self.latency, self.ranges, self.short = latency, ranges, short


@contextmanager
def serve(
    folder: Path, *, latency: float = 0.0, ranges: bool = True, short: bool = False
) -> Iterator[tuple[str, Sent]]:
    """(address, what is sent). latency: seconds before each answer; short: ranges come with a byte less."""
    sent = Sent(latency, ranges, short)

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, content: bool) -> None:
            time.sleep(sent.latency)
            sent.asked.append(self.path)
            path = folder / self.path.partition("?")[0].lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data, whole = path.read_bytes(), path.stat()
            found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if found and sent.ranges:
                first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
                data = data[first : last + 1 - sent.short]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{whole.st_size}")
            else:
                self.send_response(200)
            if sent.ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{whole.st_size}-{whole.st_mtime_ns}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if content:
                sent.requests += 1
                sent.bytes += len(data)
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
