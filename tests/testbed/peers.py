"""A TCP server to shape, and a shaper process, for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_ASK = struct.Struct("!II")


class Echo:
    """Answers each request of n bytes with m bytes; both numbers stand in front of the request."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connected = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connected += 1
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as stream:
            while len(head := stream.read(_ASK.size)) == _ASK.size:
                asked, answered = _ASK.unpack(head)
                stream.read(asked)
                connection.sendall(b"x" * answered)

    def close(self) -> None:
        self._listener.close()


def ask(connection: socket.socket, asked: int, answered: int) -> float:
    """Send `asked` bytes and wait for `answered` bytes; give the seconds it took."""
    began = time.perf_counter()
    connection.sendall(_ASK.pack(asked, answered) + b"y" * asked)
    left = answered
    while left:
        got = len(connection.recv(min(left, 1 << 20)))
        if got == 0:
            raise ConnectionError("closed")
        left -= got
    return time.perf_counter() - began


def connect(address: str, timeout_s: float = 20.0) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class ShaperProcess:
    """`python -m testbed.shaper --control ...`; `command` sends one line and gives the answer."""

    def __init__(self, *arguments: str) -> None:
        argv = [sys.executable, "-m", "testbed.shaper", "--control", *arguments]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ports: dict[str, str] = self._answer().get("result", {})

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, dict)
        return answer

    def send(self, line: bytes) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def command(self, op: str, **fields: object) -> dict[str, Any]:
        return self.send(json.dumps({"op": op, "link": "link", **fields}).encode())

    def close(self) -> int:
        """End its input and give its exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(10)
        self.process.stdout.close()
        return code


@contextlib.contextmanager
def shaper(*arguments: str) -> Iterator[ShaperProcess]:
    running = ShaperProcess(*arguments)
    try:
        yield running
    finally:
        running.close()
