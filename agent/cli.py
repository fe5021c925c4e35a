"""`edgelam-agent run | bench | info | record | version`: the command line of a board.

Imports only what parsing needs; everything else is imported by the command that uses it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Final

from agent.config import SETTINGS, AgentConfig, load
from wire.errors import EdgelamError, ExitCode, UsageError, render
from wire.ids import SITE_USER
from wire.version import VERSION

if TYPE_CHECKING:
    from agent.outside import Outside
    from agent.service import Service
    from hwprofiles.profile import Profile

PROGRAM: Final = "edgelam-agent"
KIT_PATIENCE_S: Final = 10.0
"""Finding the coordinator takes up to five seconds; its kit is retained and comes at once."""


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in our two lines."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message, try_=f"{self.prog} --help")


def parser() -> Parser:
    """The command line; each setting is also an environment variable and a key of the configuration file."""
    top = Parser(prog=PROGRAM, description="The agent of a board: finds its coordinator, measures itself, runs stages.")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}", help="print the version and end")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="serve until stopped", description="Serve until stopped.")
    bench = commands.add_parser("bench", help="measure this board and print its profile")
    bench.add_argument("--format", choices=("table", "markdown", "json"), default="table")
    bench.add_argument("--stored", action="store_true", help="print the profile of last time, measure nothing")
    bench.add_argument(
        "--sustained", metavar="SECONDS", type=float, default=0.0,
        help="then put it under load for so long (5 to 1800), for cool and sustained speed",
    )  # fmt: skip
    info = commands.add_parser("info", help="what this board is, as the coordinator would see it")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.add_argument(
        "--prove", action="store_true", help="compute with each engine and say which gave the right result"
    )
    info.add_argument("--replay", metavar="RECORDING", help="of a recorded board instead: a folder or .tar.gz")
    record = commands.add_parser("record", help="write what this board's sensors say, for a bug report")
    record.add_argument("--output", metavar="DIR|FILE.tar.gz", help="where to (default: edgelam-recording-TIME.tar.gz)")
    for command in (run, bench, info):
        command.add_argument("--config", metavar="FILE", help="JSON file with settings (EDGELAM_CONFIG)")
        for setting in SETTINGS:
            what = f"{setting.what} ({setting.variable})".replace("%", "%%")
            command.add_argument(f"--{setting.flag}", metavar=setting.metavar, help=what)
    commands.add_parser("version", help="print the version")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    try:
        options = parser().parse_args(arguments)
        if options.command == "version":
            print(f"{PROGRAM} {VERSION}")
            return ExitCode.OK
        if options.command == "record":
            from agent.recording import record

            return record(options.output)
        if options.command == "info" and options.prove and (options.replay or options.json):
            raise UsageError("--prove computes on this board, and goes with neither --replay nor --json")
        if options.command == "info" and options.replay:
            from agent.recording import replay

            return replay(options.replay, options.json)
        given = vars(options)
        flags = {setting.flag: given[setting.flag.replace("-", "_")] for setting in SETTINGS}
        config = load({**flags, "config": options.config})
        _log_to_stderr(config.log_level)
        if options.command == "info":
            return _info(config, options.json, options.prove)
        if options.command == "bench":
            return _bench(config, options.format, options.stored, options.sustained)
        return _run(config)
    except EdgelamError as error:
        print(render(error, PROGRAM), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output stopped reading; Python would complain about it once more at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=getattr(logging, level.upper()), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )


class Signals:
    """SIGTERM and SIGINT ask the service to stop; a second one of them ends the program at once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.interrupted = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.interrupted = self.interrupted or number == signal.SIGINT
        signal.signal(number, signal.SIG_DFL)
        self._service.stop()


def _outside(config: AgentConfig) -> Outside:
    """The real world: MQTT, child processes, mDNS, systemd."""
    from agent.databroker import DataBroker
    from agent.launcher import ProcessLauncher
    from agent.notify import Notifier
    from agent.outside import Advertised, Outside
    from wire.advertisement import agent_properties
    from wire.discovery import Advertiser, find_coordinator
    from wire.limits import CONTROL_KEEPALIVE_S
    from wire.messages import DeviceInfo
    from wire.mqtt import MqttTransport
    from wire.transport import Transport, Will

    def connect(url: str, client_id: str, will: Will) -> Transport:
        username = SITE_USER if config.site_key else ""
        return MqttTransport(
            url, client_id, keepalive_s=CONTROL_KEEPALIVE_S, will=will, username=username, password=config.site_key
        )

    def advertise(site: str, info: DeviceInfo) -> Advertised:
        engines = [engine.name for engine in info.engines if engine.version]
        properties = agent_properties(info.cores, info.memory_bytes, engines)
        return Advertiser(site, config.name, "agent", info.boot, 0, properties, config.interfaces or None)

    return Outside(
        connect=connect,
        launcher=ProcessLauncher,
        find=find_coordinator,
        advertise=advertise,
        data_broker=DataBroker,
        notifier=Notifier(os.environ),
    )


def _run(config: AgentConfig) -> int:
    from agent.service import Service

    service = Service(config, _outside(config))
    signals = Signals(service)
    service.run()
    return ExitCode.INTERRUPTED if signals.interrupted else ExitCode.OK


def _bench(config: AgentConfig, form: str, stored: bool, sustained_s: float) -> int:
    """Join the site, measure what its kit names, print the profile, leave."""
    from hwprofiles import profile
    from wire.limits import LEAST_SUSTAINED_S, MOST_SUSTAINED_S

    if sustained_s and (stored or not LEAST_SUSTAINED_S <= sustained_s <= MOST_SUSTAINED_S):
        raise UsageError(
            f"--sustained {sustained_s:g}{' with --stored' if stored else ''} can't be measured",
            try_=f"edgelam-agent bench --sustained SECONDS, {LEAST_SUSTAINED_S:g} to {MOST_SUSTAINED_S:g}",
        )

    path = config.state_dir / "profile.json"
    interrupted = False
    if not stored:
        from agent.service import Service

        service = Service(config, _outside(config))
        signals = Signals(service)
        service.run(until=_Patience(sustained_s))
        interrupted = signals.interrupted
    if interrupted:
        return ExitCode.INTERRUPTED
    found = profile.load(path)
    print(_shown(found, form))
    return ExitCode.OK


class _Patience:
    """Ends a service when all is measured; says what it waits for when there is nothing to measure with."""

    def __init__(self, sustained_s: float) -> None:
        self._began_s = time.monotonic()
        self._told = False
        self._sustained_s = sustained_s

    def __call__(self, service: Service) -> bool:
        if not self._told and not service.has_kit and time.monotonic() - self._began_s > KIT_PATIENCE_S:
            self._told = True
            print(
                f"{PROGRAM}: no kit to measure with yet: the coordinator makes one of each model it plans\n"
                "  try: edgelam plan MODEL on the coordinator",
                file=sys.stderr,
            )
        if service.measured and self._sustained_s:
            seconds, self._sustained_s = self._sustained_s, 0.0
            problem = service.sustain(seconds)
            if problem:
                raise UsageError(problem, try_="edgelam plan MODEL on the coordinator")
        return service.measured


def _shown(found: Profile, form: str) -> str:
    if form == "json":
        import msgspec

        from hwprofiles.profile import encode
        from hwprofiles.seal import sealed

        return msgspec.json.format(sealed(encode(found))).decode()
    from hwprofiles import report

    return report.markdown(found) if form == "markdown" else report.plain(found, _width())


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def _info(config: AgentConfig, as_json: bool, prove: bool) -> int:
    """What the info topic would say, and for people what the sensors do."""
    from pathlib import Path

    import msgspec

    from agent.describe import device_info
    from hwprofiles import board, sensors
    from hwprofiles.survey import survey
    from wire.ids import new_boot_id
    from wire.units import bytes_text

    info = device_info(survey(Path("/"), config.name, config.emulate_memory_bytes), config, new_boot_id())
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(info)).decode())
        return ExitCode.OK
    print(f"device    {info.device}" + (f"  (emulated: {info.emulated})" if info.emulated else ""))
    print(f"board     {info.board}")
    print(f"system    {info.os}, {info.arch}, Python {info.python}, edgelam {info.software}")
    print(f"cores     {info.cores:g}  ({info.cores_because})")
    print(f"memory    {bytes_text(info.memory_bytes)}  ({info.memory_because})")
    for engine in info.engines:
        print(f"engine    {engine.name} {engine.version or '-'}  ({engine.because})")
    print(f"network   {', '.join(info.addresses) or 'no address'}")
    print(f"cache     {config.cache_dir}, at most {bytes_text(info.cache_bytes)}")
    for item, value in sensors.lines(board.read()):
        print(f"{item:<9} {value}")
    if prove:
        from hwprofiles.probe import proof

        for line in sensors.proof_lines(proof.prove_all()):
            print(f"{'proof':<9} {line}")
    return ExitCode.OK
