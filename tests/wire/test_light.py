"""What the agent's supervisor imports stays light: it runs on every board, all the time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import wire

LIGHT = [
    "ids", "units", "limits", "errors", "topics", "messages", "transport", "mqtt", "memory", "discovery", "broker",
    "version", "flow",
]  # fmt: skip


@pytest.mark.parametrize("heavy", ["numpy", "onnxruntime", "torch", "amqtt"])
def test_the_control_plane_imports_nothing_heavy(heavy):
    program = f"import sys, {', '.join('wire.' + name for name in LIGHT)}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_no_file_of_ours_uses_qos_2_or_small_socket_buffers():
    for path in Path(wire.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "SO_RCVBUF" not in text, path
        assert "SO_SNDBUF" not in text, path
        assert "qos=2" not in text, path
