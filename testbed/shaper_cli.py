"""A shaped link as a program.

    python -m testbed.shaper --listen 127.0.0.1:0 --upstream HOST:PORT --rate-mbit 20 --delay-ms 5 --jitter-ms 1
    python -m testbed.shaper --preset wifi --forward mqtt=127.0.0.1:0,HOST:1883 --forward http=127.0.0.1:0,HOST:8080

All forwards share the one link, named "link". The first line of output is JSON: {"ok": true, "result": {"mqtt":
"127.0.0.1:40123", ...}}. With --control, JSON lines on standard input are obeyed (testbed.control); the end of input
ends the program, as SIGINT and SIGTERM do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

import msgspec

from testbed import links
from testbed.control import Answer, LinkCommand, LinkControl, obey, serve_lines
from testbed.links import Address, LinkSpec, parse_address
from testbed.shaper import Shaper, new_event_loop
from wire.errors import EdgelamError, ExitCode, UsageError, render

LINK = "link"


def run(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    loop = new_event_loop()
    try:
        return loop.run_until_complete(_main(_spec(options), _forwards(options), options.control))
    except EdgelamError as error:
        print(render(error, "testbed.shaper"), file=sys.stderr)
        return error.exit_code
    finally:
        loop.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m testbed.shaper", description=__doc__.partition("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="listen here; port 0 takes a free one")
    parser.add_argument("--upstream", metavar="HOST:PORT", help="carry connections to this address")
    parser.add_argument(
        "--forward", metavar="NAME=LISTEN,UPSTREAM", action="append", default=[], help="one more of them"
    )
    parser.add_argument("--preset", choices=[name for name, link in links.PRESETS.items() if link], help="a named link")
    parser.add_argument("--rate-mbit", type=float, help="each direction; unlimited if not given")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way, at least")
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="added to the delay, at most")
    parser.add_argument("--control", action="store_true", help="obey JSON lines on standard input until its end")
    return parser


def _spec(options: argparse.Namespace) -> LinkSpec:
    if options.preset is None:
        return LinkCommand(
            link=LINK, rate_mbit=options.rate_mbit, delay_ms=options.delay_ms, jitter_ms=options.jitter_ms
        ).spec()
    if options.rate_mbit is not None or options.delay_ms or options.jitter_ms:
        raise UsageError("--preset and figures of a link exclude each other", try_="give one or the other")
    return links.preset(options.preset) or LinkSpec()


def _forwards(options: argparse.Namespace) -> dict[str, tuple[Address, Address]]:
    texts = list(options.forward)
    if options.listen or options.upstream:
        texts.append(f"default={options.listen or '127.0.0.1:0'},{options.upstream or ''}")
    forwards = {}
    for text in texts:
        name, equals, addresses = text.partition("=")
        listen, comma, upstream = addresses.partition(",")
        if not (name and equals and comma):
            raise UsageError(
                f"forward {text!r}", try_="NAME=LISTEN,UPSTREAM, for example mqtt=127.0.0.1:0,10.0.0.5:1883"
            )
        forwards[name] = (parse_address(listen, "listen address"), parse_address(upstream, "upstream"))
    if not forwards and not options.control:
        raise UsageError("nothing to forward", try_="--listen 127.0.0.1:0 --upstream HOST:PORT")
    return forwards


async def _main(spec: LinkSpec, forwards: dict[str, tuple[Address, Address]], control: bool) -> int:
    shaper = Shaper()
    shaper.add_link(LINK, spec)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        listening = {
            name: (await shaper.add_forward(LINK, name, listen, upstream)).text()
            for name, (listen, upstream) in forwards.items()
        }
        _say(msgspec.json.encode(Answer(ok=True, result=listening)) + b"\n")
        if control:
            reading = asyncio.ensure_future(serve_lines(0, LinkControl, lambda command: obey(shaper, command), _say))
            reading.add_done_callback(lambda _: ended.set())
            await ended.wait()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        else:
            await ended.wait()
    finally:
        await shaper.close()
    return ExitCode.OK


def _say(line: bytes) -> None:
    """Write one answer at once; standard output may be a pipe whose reader waits for it."""
    view = memoryview(line)
    while view:
        view = view[os.write(1, view) :]
