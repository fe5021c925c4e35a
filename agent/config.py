"""What an agent is told: ONE table of settings, each taken from flag > environment > file > default.

The flag of `broker` is --broker, its environment variable EDGELAM_BROKER, its key in the file "broker". The file is
JSON, named by --config or EDGELAM_CONFIG, else /etc/edgelam/agent.json where that exists. Help text and
documentation are made from the table.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple, get_args

import msgspec
from msgspec import Struct

from wire.addresses import DEFAULT_MQTT_PORT, host_port_text
from wire.errors import UsageError
from wire.ids import checked_name
from wire.messages import EngineName
from wire.units import bytes_text

MOST_DATA: Final = 64
"""Data sets of a board (wire.messages.DeviceInfo)."""
MOST_EPSILON: Final = 1e6
MEASURE_BUDGET_S: Final = 0.5
"""Seconds per point of a measurement: a kit has some 18 points, and a board that joins should soon be of use."""

SYSTEM_FILE: Final = Path("/etc/edgelam/agent.json")
MAX_CACHE_BYTES: Final = 20_000_000_000
"""Default cache limit, or half of what is free where that is less: a board's card must not fill up."""

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class HostPort(Struct, frozen=True):
    host: str
    port: int

    def __str__(self) -> str:
        return host_port_text(self.host, self.port)


class Via(Struct, frozen=True):
    """Dial these instead of the coordinator's own addresses; None = as found."""

    mqtt: HostPort | None = None
    http: HostPort | None = None


class AgentConfig(Struct, frozen=True, kw_only=True):
    """All that an agent is told. `site` '' = the only one that mDNS finds; `broker` '' = found by mDNS."""

    site: str = ""
    name: str = "device"
    broker: str = ""
    state_dir: Path
    cache_dir: Path
    cache_limit_bytes: int = MAX_CACHE_BYTES
    interfaces: tuple[str, ...] = ()
    via: Via = Via()
    emulate_speed: float = 1.0
    emulate_throttle: str = ""
    """A file with the share of its speed that a virtual board has now; '' = all of it, always."""
    emulate_shared: str = ""
    """A folder in which virtual boards of one machine share what it was measured to be; '' = each measures it."""
    emulate_memory_bytes: int = 0
    """0 = not emulated."""
    threads: int = 0
    """0 = as many as the processors that may be used."""
    measure_budget_s: float = MEASURE_BUDGET_S
    engines: tuple[EngineName, ...] | None = None
    """To measure with besides the processor; None: those for a GPU that are there."""
    data_broker: bool = True
    data_port: int = 0
    """0 = the one of last time, or any."""
    data_address: str = ""
    """HOST:PORT; '' = as it is."""
    data: tuple[tuple[str, str], ...] = ()
    """(name, file or folder) of what this board may be trained on; it stays here."""
    data_epsilon: tuple[tuple[str, float], ...] = ()
    """(name, epsilon): those of them that private jobs alone may use, and how much these may come to know in all."""
    data_states: tuple[str, ...] = ()
    """Those of these whose states may leave the board in jobs that split their model, although no noise covers them."""
    site_key: str = ""
    log_level: str = "info"

    @property
    def emulation(self) -> str:
        """What is emulated, in words; '' for a real board."""
        parts = []
        if self.emulate_speed < 1.0:
            parts.append(f"speed {self.emulate_speed:g}")
        if self.emulate_memory_bytes:
            parts.append(f"memory {bytes_text(self.emulate_memory_bytes)}")
        return ", ".join(parts)


def size_bytes(text: str) -> int:
    """'512MB' -> 536_870_912; '1.5G', '20 GiB' and plain numbers too. Powers of 1024, as memory is sold."""
    found = _SIZE.match(text)
    if not found:
        raise UsageError(f"{text!r} is not a size", try_="for example 512MB or 4GB")
    return int(float(found[1]) * 1024 ** _POWER[found[2].lower()])


def host_port(text: str, default_port: int = 0) -> HostPort:
    """'10.0.0.5:8570', 'host:1', '[::1]:1883' -> HostPort; the port may be left out where there is a default."""
    host, separator, port = text.rpartition(":")
    if not separator or (host.count(":") and not host.startswith("[")):
        host, port = text, str(default_port)
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{text!r} is not HOST:PORT", try_=f"for example 10.0.0.5:{default_port or DEFAULT_MQTT_PORT}")
    return HostPort(host, int(port))


def broker_url(text: str) -> str:
    """'10.0.0.5' -> 'mqtt://10.0.0.5:8570'; '' stays ''."""
    if not text:
        return ""
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "mqtt", text
    if scheme != "mqtt":
        raise UsageError(f"broker {text!r}: only mqtt:// is spoken", try_="mqtt://HOST:PORT")
    return f"mqtt://{host_port(rest.rstrip('/'), DEFAULT_MQTT_PORT)}"


def via(text: str) -> Via:
    """'mqtt=127.0.0.1:7001,http=127.0.0.1:7002' -> Via."""
    found: dict[str, HostPort] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, separator, value = part.partition("=")
        if not separator or key not in ("mqtt", "http"):
            raise UsageError(f"--via {part!r}: neither mqtt= nor http=", try_="--via mqtt=HOST:PORT,http=HOST:PORT")
        found[key] = host_port(value)
    return Via(**found)


def legal_name(hostname: str) -> str:
    """The nearest legal device name: 'Pi5.local' -> 'pi5'."""
    label = re.sub(r"[^a-z0-9-]+", "-", hostname.split(".")[0].lower()).strip("-")[:32].strip("-")
    return label or "device"


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0.0 < speed <= 1.0:
        raise UsageError(f"--emulate-speed {text}: not above 0 and at most 1", try_="0.5 is half as fast as it is")
    return speed


def _engines(text: str) -> tuple[EngineName, ...] | None:
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    try:
        return tuple(msgspec.convert(name.strip(), type=EngineName) for name in text.split(","))
    except msgspec.ValidationError:
        raise UsageError(
            f"--engines {text!r}: no such engine", try_=f"auto, none, or of {', '.join(get_args(EngineName))}"
        ) from None


def _threads(text: str) -> int:
    if not text.isdigit() or not 0 <= int(text) <= 1024:
        raise UsageError(f"--threads {text!r}: not a number from 0 to 1024", try_="0 is all processors")
    return int(text)


def _budget(text: str) -> float:
    try:
        budget_s = float(text)
    except ValueError:
        budget_s = 0.0
    if not 0.0 < budget_s <= 60.0:
        raise UsageError(f"--measure-budget {text}: not above 0 and at most 60", try_="seconds per point, 0.5 for one")
    return budget_s


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"--data-broker {text!r}: neither on nor off", try_="--data-broker off")
    return text == "on"


def _port(text: str) -> int:
    if not text.isdigit() or not 0 <= int(text) < 65536:
        raise UsageError(f"--data-port {text!r}: not a port", try_="1 to 65535; 0 is any")
    return int(text)


def _data_address(text: str) -> str:
    return str(host_port(text))


def _level(text: str) -> str:
    if text not in ("debug", "info", "warning", "error"):
        raise UsageError(f"--log-level {text!r}", try_="debug, info, warning or error")
    return text


def _folder(text: str) -> Path:
    return Path(text).expanduser().resolve()


def _path(text: str) -> str:
    return str(_folder(text))


def _name(text: str) -> str:
    return checked_name(text, "device name")


def _site(text: str) -> str:
    return checked_name(text, "site")


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _key(text: str) -> str:
    """The site key is the first line of the file."""
    try:
        lines = Path(text).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"site key file {text}: {_words(error)}", try_="a file whose first line is the key") from None
    except UnicodeDecodeError:
        raise UsageError(f"site key file {text}: not text", try_="a file whose first line is the key") from None
    if not lines or not lines[0].strip():
        raise UsageError(f"site key file {text} is empty", try_="a file whose first line is the key")
    return lines[0].strip()


def _data(text: str) -> tuple[tuple[str, str], ...]:
    """'notes=/srv/notes.jsonl,mail=/srv/mail'"""
    found: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, separator, path = part.partition("=")
        if not separator or not path or name in found or len(found) == MOST_DATA:
            raise UsageError(f"--data {part!r}: not NAME=FILE, or too many", try_="--data notes=/srv/notes.jsonl")
        found[checked_name(name, "data set")] = _path(path)
    return tuple(found.items())


def _data_epsilon(text: str) -> tuple[tuple[str, float], ...]:
    """'notes=8,mail=2'"""
    found: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 < value <= MOST_EPSILON or name in found:
            raise UsageError(f"--data-epsilon {part!r}: not NAME=EPSILON", try_="--data-epsilon notes=8")
        if len(found) == MOST_DATA:
            raise UsageError(f"--data-epsilon: more than {MOST_DATA} data sets", try_="--data-epsilon notes=8")
        found[checked_name(name, "data set")] = value
    return tuple(found.items())


def _data_states(text: str) -> tuple[str, ...]:
    """'notes,mail'"""
    return tuple(checked_name(part, "data set") for part in _addresses(text))


def _addresses(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (piece.strip() for piece in text.split(","))))


class Setting(NamedTuple):
    """A row: `field` of AgentConfig, its flag, how text becomes its value, and what it is."""

    field: str
    flag: str
    metavar: str
    parse: Callable[[str], object]
    what: str

    @property
    def variable(self) -> str:
        return "EDGELAM_" + self.flag.upper().replace("-", "_")


SETTINGS: Final[tuple[Setting, ...]] = (
    Setting("site", "site", "NAME", _site, "which site to join (default: the only one found)"),
    Setting("name", "name", "NAME", _name, "name of this device (default: from the host name)"),
    Setting("broker", "broker", "URL", broker_url, "mqtt://HOST:PORT (default: found by mDNS)"),
    Setting("state_dir", "state-dir", "DIR", _folder, "where identity, epochs and profile are kept"),
    Setting("cache_dir", "cache-dir", "DIR", _folder, "where weights are kept; they can be fetched again"),
    Setting("cache_limit_bytes", "cache-limit", "SIZE", size_bytes, "most cache (20 GB, or half of what is free)"),
    Setting("interfaces", "interfaces", "A,B", _addresses, "addresses to speak mDNS on (default: all)"),
    Setting("via", "via", "mqtt=H:P,http=H:P", via, "dial these instead of the coordinator's addresses (tunnels)"),
    Setting("emulate_speed", "emulate-speed", "F", _speed, "pretend to be a slower processor: 0 < F <= 1"),
    Setting("emulate_throttle", "emulate-throttle", "FILE", _path, "file with the share of that speed there is now"),
    Setting("emulate_shared", "emulate-shared", "DIR", _path, "where boards of one machine share what it measured"),
    Setting("emulate_memory_bytes", "emulate-memory", "SIZE", size_bytes, "pretend to have only so much memory"),
    Setting("threads", "threads", "N", _threads, "threads of an engine (default: all processors that may be used)"),
    Setting("engines", "engines", "A,B", _engines, "to measure besides the processor (auto: those for a GPU; none)"),
    Setting("measure_budget_s", "measure-budget", "S", _budget, "seconds per point of measuring (default: 0.5)"),
    Setting("data_broker", "data-broker", "on|off", _on_off, "a broker of its own for activations (default: on)"),
    Setting("data_port", "data-port", "PORT", _port, "of that broker (default: the one of last time, or any)"),
    Setting("data_address", "data-address", "H:P", _data_address, "where others reach that broker (tunnels)"),
    Setting("data", "data", "NAME=FILE,...", _data, "what jobs may train this board on; it stays here"),
    Setting("data_epsilon", "data-epsilon", "NAME=E,...", _data_epsilon, "most that jobs may come to know of it"),
    Setting("data_states", "data-states", "NAME,...", _data_states, "those of these whose states may leave the board"),
    Setting("site_key", "site-key-file", "FILE", _key, "file with the site's key, for broker and artifacts"),
    Setting("log_level", "log-level", "LEVEL", _level, "debug, info, warning or error"),
)  # fmt: skip


def load(flags: Mapping[str, str | None], environment: Mapping[str, str] | None = None) -> AgentConfig:
    """Join the four sources; `flags` maps flag names ('state-dir') to given texts. Raise UsageError."""
    environment = os.environ if environment is None else environment
    file = _read_file(flags.get("config") or environment.get("EDGELAM_CONFIG"))
    values = _defaults(environment)
    for setting in SETTINGS:
        text = flags.get(setting.flag)
        if text is None:
            text = environment.get(setting.variable) or None
        if text is None:
            text = file.get(setting.flag)
        if text is not None:
            values[setting.field] = setting.parse(text)
    if "cache_limit_bytes" not in values:
        values["cache_limit_bytes"] = _default_cache_limit(Path(str(values["cache_dir"])))
    config = AgentConfig(**values)  # type: ignore[arg-type]
    for name, _ in config.data_epsilon:
        if name not in dict(config.data):
            raise UsageError(f"--data-epsilon {name}: there is no such data set", try_=f"--data {name}=FILE beside it")
    for name in config.data_states:
        if name not in dict(config.data_epsilon):
            raise UsageError(
                f"--data-states {name}: of data without a bound states may leave the board anyway",
                try_=f"--data-epsilon {name}=8 beside it",
            )
    return config


def _read_file(named: str | None) -> dict[str, str]:
    path = Path(named) if named else SYSTEM_FILE
    if not named and not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"configuration {path}: {_words(error)}", try_="check --config and EDGELAM_CONFIG") from None
    except ValueError as error:
        raise UsageError(f"configuration {path}: not JSON ({error})", try_='for example {"site": "lab"}') from None
    known = {setting.flag for setting in SETTINGS}
    if not isinstance(found, dict) or not set(found) <= known:
        strange = sorted(set(found) - known) if isinstance(found, dict) else "not an object"
        raise UsageError(f"configuration {path}: {strange}", try_=f"keys are: {', '.join(sorted(known))}")
    return {key: str(value) for key, value in found.items()}


def _defaults(environment: Mapping[str, str]) -> dict[str, object]:
    """systemd's folders if it gave some, else $EDGELAM_STATE and $EDGELAM_CACHE, else the XDG ones."""
    home = Path(environment.get("HOME") or Path.home())
    state = environment.get("STATE_DIRECTORY", "").split(":")[0]
    if not state:
        state_root = environment.get("EDGELAM_STATE") or str(
            Path(environment.get("XDG_STATE_HOME") or home / ".local" / "state") / "edgelam"
        )
        state = str(Path(state_root) / "agent")
    cache = environment.get("CACHE_DIRECTORY", "").split(":")[0] or environment.get("EDGELAM_CACHE")
    if not cache:
        cache = str(Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "edgelam")
    return {"name": legal_name(socket.gethostname()), "state_dir": _folder(state), "cache_dir": _folder(cache)}


def _default_cache_limit(cache_dir: Path) -> int:
    folder = cache_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = os.statvfs(folder)
    return min(MAX_CACHE_BYTES, usage.f_bavail * usage.f_frsize // 2)
