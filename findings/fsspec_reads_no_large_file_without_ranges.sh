#!/usr/bin/env bash
# fsspec 2026.9.0 with aiohttp 3.14.5: a shard over 5 MiB on a web server that ignores `Range` (Python's own
# http.server, many simple ones) cannot be read from front to back through `fsspec.open`, though that needs no
# range: the first block is asked for as one, and the whole file as an answer is an error. A smaller file is
# read, and `block_size=0` (one streamed answer, no seeking) reads the large one, too. fsspec streams by itself
# only where the server says `Accept-Ranges: none`; one that says nothing is taken to answer ranges.
# Seen on 2026-11-28:
#   5242880 bytes: 5242880 read
#   6291456 bytes: ValueError
#   6291456 bytes, block_size=0: 6291456 read
# Exits 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5
"$folder/venv/bin/python" - "$folder" <<'PY'
import functools
import http.server
import sys
import threading
from pathlib import Path

import fsspec

LIMIT, LARGE = 5 * 2**20, 6 * 2**20


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


for size in (LIMIT, LARGE):
    (Path(sys.argv[1]) / f"{size}.tar").write_bytes(bytes(size))
handler = functools.partial(Quiet, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()


def read(size, **options):
    count = 0
    try:
        with fsspec.open(f"http://127.0.0.1:{server.server_port}/{size}.tar", "rb", **options) as file:
            while data := file.read(1 << 16):
                count += len(data)
    except ValueError:
        return "ValueError"
    return f"{count} read"


found = [read(LIMIT), read(LARGE), read(LARGE, block_size=0)]
for text, size in zip(found, (f"{LIMIT} bytes", f"{LARGE} bytes", f"{LARGE} bytes, block_size=0")):
    print(f"{size}: {text}")
sys.exit(found != [f"{LIMIT} read", "ValueError", f"{LARGE} read"])
PY
