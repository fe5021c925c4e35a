"""Where the coordinator keeps things, and how its clients find it.

    <state>/coordinator.json     address of the running coordinator (for clients; removed at the end)
    <state>/ports.json           ports it listened on last
    <state>/journal.sqlite       deployments, epochs, artifacts: what was acknowledged
    <state>/artifacts/           stage graphs, by digest
    <state>/broker/              configuration, log and persistence of the supervised broker

`<state>` is $EDGELAM_STATE, else $XDG_STATE_HOME/edgelam, else ~/.local/state/edgelam. Packed models live in the
cache (models.cache), since they can be made again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec
from msgspec import Struct

from wire.errors import Unreachable

DEFAULT_HTTP_PORT = 8571


def state_dir() -> Path:
    """The state folder, not yet created."""
    named = os.environ.get("EDGELAM_STATE")
    if named:
        return Path(named).expanduser().resolve()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "edgelam"


class Address(Struct, frozen=True, kw_only=True):
    """The running coordinator, as written to coordinator.json."""

    site: str
    boot: str
    pid: int
    http_url: str
    mqtt_url: str
    broker: str
    """Which broker, and why, in words."""


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: whoever reads sees the old or the new file, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Ports(Struct, frozen=True):
    """The ports that a coordinator listened on last, as kept in ports.json; 0: none yet. Boards and programs know them
    from then, so the next one takes them again if it can."""

    mqtt: int = 0
    http: int = 0


def write_ports(state: Path, ports: Ports) -> None:
    if ports != read_ports(state):
        write_atomically(state / "ports.json", msgspec.json.encode(ports))


def read_ports(state: Path) -> Ports:
    """The ports on file; none when there is no file or it can't be read."""
    try:
        return msgspec.json.decode((state / "ports.json").read_bytes(), type=Ports)
    except (OSError, msgspec.DecodeError):
        return Ports()


def write_address(state: Path, address: Address) -> None:
    write_atomically(state / "coordinator.json", msgspec.json.format(msgspec.json.encode(address)), mode=0o600)


def forget_address(state: Path, boot: str) -> None:
    """Remove coordinator.json if it is still ours."""
    address = read_address(state)
    if address is not None and address.boot == boot:
        (state / "coordinator.json").unlink(missing_ok=True)


def read_address(state: Path) -> Address | None:
    """The address on file; None when there is none or it can't be read."""
    try:
        return msgspec.json.decode((state / "coordinator.json").read_bytes(), type=Address)
    except (OSError, msgspec.DecodeError):
        return None


def coordinator_url(named: str | None) -> str:
    """The HTTP address clients should use: --coordinator, $EDGELAM_COORDINATOR, or the one running on this machine."""
    given = named or os.environ.get("EDGELAM_COORDINATOR")
    if given:
        return given.rstrip("/")
    address = read_address(state_dir())
    if address is None:
        raise Unreachable("no coordinator is running here", try_="edgelam up (or --coordinator http://HOST:8571)")
    return address.http_url
