"""Requests that a web page open beside ``clipcov ui`` could make, sent to the really started servers."""

import base64
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
import yaml

from assets.running.guard import HOST_VARIABLE, refusal
from assets.running.ui import MLFLOW_SETTINGS, commands, stop
from clipcov_pipeline.experiment.config.load import load_config
from lab import free_ports

JSON = {"content-type": "application/json"}
ASK = json.dumps({"query": "{ version }"})
FIND = json.dumps({"max_results": 1})
PATHS = {"Dagster's web server": ("/graphql", ASK), "MLflow": ("/api/2.0/mlflow/experiments/search", FIND)}


def asked(port: int, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


@contextmanager
def started(name: str, folder: Path, port: int) -> Iterator[None]:
    settings = yaml.safe_load(Path("clipcov_pipeline/experiment/config/presets/sample.yaml").read_text())
    settings |= {"work_dir": str(folder), "ui": {"dagster_port": port, "mlflow_port": port}}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    home = folder / "dagster_home"
    home.mkdir()
    (folder / "mlflow").mkdir()
    (folder / "empty.py").write_text("import dagster as dg\n\ndefs = dg.Definitions()\n")
    config = load_config(str(path))
    command = commands(config)[name]
    if "--workspace" in command:  # a small code location: what is tested stands before it
        command = [*command[: command.index("--workspace")], "--python-file", str(folder / "empty.py")]
    environment = {**os.environ, **MLFLOW_SETTINGS, HOST_VARIABLE: config.ui.host, "DAGSTER_HOME": str(home)}
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        end = time.monotonic() + 90
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield
    finally:
        stop([server])


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_a_foreign_page_is_refused_and_the_own_page_is_answered(name: str, tmp_path: Path) -> None:
    [port], (path, body) = free_ports(1), PATHS[name]
    with started(name, tmp_path, port):
        own = f"http://127.0.0.1:{port}"
        assert asked(port, "POST", path, body, **JSON)[0] == 200
        assert asked(port, "POST", path, body, **JSON, Origin=own)[0] == 200
        assert asked(port, "GET", "/")[0] == 200
        assert asked(port, "GET", "/", Host=f"localhost:{port}")[0] == 200
        for method, content, headers in (
            ("POST", body, {**JSON, "Host": "evil.example"}),
            ("GET", None, {"Host": f"evil.example:{port}"}),
            ("POST", body, {**JSON, "Origin": "http://evil.example"}),
            ("POST", body, {**JSON, "Origin": "null"}),
            ("POST", body, {**JSON, "Origin": "http://127.0.0.1:1"}),  # another server of this machine
            ("GET", None, {"Origin": "http://evil.example"}),
            ("POST", body, {"Content-Type": "text/plain"}),
            ("POST", body, {"Content-Type": "text/plain; x=application/json"}),
        ):
            assert asked(port, method, path, content, **headers)[0] == 403, (method, headers)
        if name != "MLflow":
            assert asked(port, "GET", f"{path}?{urlencode({'query': '{ version }'})}")[0] == 403
            assert websocket(port, own) == 101
            assert websocket(port, "http://evil.example") == 403


def websocket(port: int, origin: str) -> int:
    """The status that opening Dagster's subscriptions gets."""
    key = base64.b64encode(b"0123456789abcdef").decode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(
            f"GET /graphql HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: graphql-ws\r\n"
            f"Origin: {origin}\r\n\r\n".encode()
        )
        return int(line.recv(4096).split()[1])


@pytest.mark.parametrize(
    ("listens", "host", "passes"),
    [
        ("127.0.0.1", "127.0.0.1:3000", True),
        ("127.0.0.1", "[::1]:3000", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "10.0.0.7:3000", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "", False),
        ("0.0.0.0", "10.0.0.7:3000", True),
        ("0.0.0.0", f"{socket.gethostname()}:3000", True),
        ("0.0.0.0", "evil.example:3000", False),
    ],
)
def test_hosts(listens: str, host: str, passes: bool) -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", host.encode())]}
    assert (refusal(scope, listens) is None) == passes
