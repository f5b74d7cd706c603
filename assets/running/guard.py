"""What stands before the servers of ``clipcov ui``: a web page open beside them reaches neither.

A browser sends a page's requests to this machine too, and a foreign name may be made to lead here (DNS
rebinding). So a request is refused (403) that asks for a host which is not this machine, that comes from
another origin, that writes in a form which browsers send without asking first, or that puts GraphQL into an
address.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

HOST_VARIABLE = "CLIPCOV_UI_HOST"
"""The environment variable by which the servers' processes learn where they listen."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

# https://fetch.spec.whatwg.org/#cors-safelisted-request-header: sent to anybody without asking first
_UNASKED = ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data")

_App = Callable[[Any, Any, Any], Awaitable[None]]


def allowed_hosts(host: str) -> list[str]:
    """Return the names, without port, by which a server that listens on ``host`` may be asked for.

    A server that others reach also takes this machine's own name; addresses in numbers: see `refusal`.
    """
    names = [*LOOPBACK, _bracketed(host)]
    return names if is_loopback(host) else [*names, socket.gethostname(), socket.getfqdn()]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refusal(scope: Any, host: str) -> str | None:
    """Return why a request is refused, None where it may pass.

    Args:
        scope: ASGI's, of a request or a websocket.
        host: where the server listens. Where others reach it, any address in numbers is taken: only names
            can be made to lead elsewhere.
    """
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    asked = headers.get("host", "").lower()
    if not _is_ours(asked, host):
        return f"Host: found {asked!r}, expected this machine: ui.host in the YAML says where it listens"
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{asked}", f"https://{asked}"):
        return f"Origin: found {origin!r}, expected http://{asked}: another page may not ask this server"
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if scope.get("method") == "POST" and kind in _UNASKED:
        return f"Content-Type: found {kind!r}, expected application/json"
    in_address = "query" in parse_qs(scope.get("query_string", b"").decode("latin-1"))
    if scope["path"].rstrip("/").endswith("/graphql") and in_address:
        return "found GraphQL in the address, expected it in the body of a POST"
    return None


def _is_ours(asked: str, host: str) -> bool:
    name = asked.rpartition(":")[0] if asked.rpartition(":")[2].isdigit() else asked
    if name in [known.lower() for known in allowed_hosts(host)]:
        return True
    try:
        return not is_loopback(host) and bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class Guard:
    """An ASGI application before another; what `refusal` refuses never reaches that."""

    def __init__(self, app: _App, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 403 with the reason in plain text, or hand on."""
        reason = refusal(scope, self.host) if scope["type"] in ("http", "websocket") else None
        if reason is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: a 403
        else:
            plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
            await send({"type": "http.response.start", "status": 403, "headers": plain})
            await send({"type": "http.response.body", "body": reason.encode()})
