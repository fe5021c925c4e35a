"""Who may come in at the HTTP door.

    from another machine    only who sends the site key, where there is one
    on this machine         every program; but no page that a browser has open, since pages come from anywhere

A page reaches 127.0.0.1 in two ways, and gives itself away in both. Under a name of its own that it has pointed at us
(DNS rebinding) it sends that name as Host: only names of this machine are served, and plain addresses, which nobody can
point elsewhere. From its own site it sends its Origin (RFC 6454, section 7): only our own is served, and none, as
programs send. What a page may send without either (a form, an image) is no JSON, and so no POST of ours.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import socket
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.openai.errors import reply_at
from wire.errors import Refused, UsageError

LOG = logging.getLogger("edgelam.api")

LOOPBACK_NAMES = frozenset({"localhost"})
JSON_TYPE = b"application/json"
FOREIGN = (b"cross-site", b"same-site")
"""Sec-Fetch-Site of what a page of another site or port asks for (W3C Fetch Metadata)."""
SHOWN = 80
"""Characters of a header that an error repeats."""


def door_names(listen: str) -> frozenset[str]:
    """Names under which this machine's door is known: of the loopback, its own, also over mDNS, and `listen`."""
    own = socket.gethostname().lower()
    short = own.partition(".")[0]
    return LOOPBACK_NAMES | {own, short, f"{short}.local", listen.lower()} - {"", ".local"}


class Guard:
    """ASGI middleware that keeps to the rules above. `names`: what Host may say, beside addresses."""

    def __init__(self, app: ASGIApp, site_key: str, names: frozenset[str]) -> None:
        self._app = app
        self._expected = f"Bearer {site_key}".encode()
        self._open = not site_key
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, knows_key = scope["path"], self._knows_key(scope)
            if not (self._open or knows_key or is_local(scope)):
                refused = Refused("wrong or missing site key", try_="--site-key-file FILE; other programs: Bearer KEY")
                await reply_at(path, refused, 401)(scope, receive, send)
                return
            # No page knows the key: whoever sends it may call us as he likes.
            reason = "" if knows_key else self._foreign_host(scope)
            reason = reason or foreign_origin(scope)
            if reason:
                refused = Refused(reason, try_="use the address of this machine, or edgelam")
                await reply_at(path, refused, 403)(scope, receive, send)
                return
            if scope["method"] == "POST" and not _is_json(scope):
                wrong = UsageError("the request is not JSON", try_="Content-Type: application/json")
                await reply_at(path, wrong, 415)(scope, receive, send)
                return
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            LOG.debug("a client went away")

    def _knows_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return not self._open and hmac.compare_digest(given, self._expected)

    def _foreign_host(self, scope: Scope) -> str:
        """Why the name under which we are called is none of ours; '' if it is one."""
        hosts = _header(scope, b"host")
        if len(hosts) != 1:
            return "a request names one host"
        name = host_name(hosts[0])
        if name in self._names or _is_address(name):
            return ""
        return f"{hosts[0][:SHOWN]!r} is no name of this machine"


def host_name(host: str) -> str:
    """The name or address in a Host header: without port, brackets and final dot, in small letters; '' if none is."""
    try:
        parts = urlsplit(f"//{host}")
        name = parts.hostname or ""
        _ = parts.port
    except ValueError:
        return ""
    return name.removesuffix(".") if parts.netloc == host and "@" not in host else ""


def foreign_origin(scope: Scope) -> str:
    """Why a request comes from a page that is not ours; '' if it doesn't."""
    host = next(iter(_header(scope, b"host")), "").lower()
    for origin in _header(scope, b"origin"):
        scheme, _, authority = origin.lower().partition("://")
        if scheme not in ("http", "https") or not host or authority != host:
            return f"a page of {origin[:SHOWN]!r} may not use this coordinator"
    if any(value.lower() in FOREIGN for key, value in scope["headers"] if key == b"sec-fetch-site"):
        return "a page of another site may not use this coordinator"
    return ""


def is_local(scope: Scope) -> bool:
    """Whether the caller is on this machine."""
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_json(scope: Scope) -> bool:
    types = [value for key, value in scope["headers"] if key == b"content-type"]
    return len(types) == 1 and types[0].partition(b";")[0].strip().lower() == JSON_TYPE


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
