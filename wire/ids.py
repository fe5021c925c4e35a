"""Names and identities, and the rules they must keep."""

from __future__ import annotations

import re
import secrets
from typing import Annotated

from msgspec import Meta

from wire.errors import UsageError

DEFAULT_SITE = "home"
"""The site of a coordinator that was given no other name."""

SITE_USER = "edgelam"
"""The one user name of a site's broker; its password is the site key."""

_NAME = re.compile(r"^[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?$")
_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")

Name = Annotated[str, Meta(pattern=_NAME.pattern)]
Digest = Annotated[str, Meta(pattern=_DIGEST.pattern)]


def checked_name(text: str, what: str) -> str:
    """Give `text` back if it may stand as a site, device or deployment name (a topic level and a DNS label)."""
    if not _NAME.match(text):
        raise UsageError(
            f"{what} {text!r}: not a name",
            try_="1 to 32 lower-case letters, digits and hyphens; a letter or digit first and last",
        )
    return text


def is_name(text: str) -> bool:
    return _NAME.match(text) is not None


def is_digest(text: str) -> bool:
    return _DIGEST.match(text) is not None


def site_option(site: str) -> str:
    """What a printed command needs to mean this site: ' --site lab', or '' for the default one."""
    return "" if site == DEFAULT_SITE else f" --site {site}"


def new_boot_id() -> str:
    """Identity of one run of a program on one device: 12 hex digits. Not a secret."""
    return secrets.token_hex(6)


def new_stream_id() -> int:
    """Identity of one sender's byte stream to one inbox: 63 random bits, never reused."""
    return secrets.randbits(63) | 1


def new_request_id() -> int:
    """Identity of one request: 63 random bits."""
    return secrets.randbits(63) | 1
