"""What systemd wants to hear: READY=1, WATCHDOG=1, STATUS=, STOPPING=1. Silent where nobody listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Datagrams to $NOTIFY_SOCKET; `watchdog_period_s` is half of what systemd allows, 0 without a watchdog."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        allowed_us = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_period_s = int(allowed_us) / 2e6 if self._address and ours and allowed_us.isdigit() else 0.0

    def say(self, text: str) -> bool:
        """Send one line; give False where nobody listens."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.connect(self._address)
                sender.sendall(text.encode())
        except OSError:
            return False
        return True
