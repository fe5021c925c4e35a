"""The page in a real browser: it renders, it prints, and it asks nobody for anything."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hwprofiles.report.document import make
from hwprofiles.report.page import POLICY, report_page
from tests.hwprofiles.test_report_document import NOW, hostile, report

CHROMIUM = shutil.which("chromium")
PATIENCE_S = 60
SMUGGLED = "smuggled.test"
ASKS = f'<img src="http://{SMUGGLED}/x.png"><script src="http://{SMUGGLED}/x.js"></script>'

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@contextmanager
def proxy() -> Iterator[tuple[int, list[str]]]:
    """A port that answers nothing, and the first lines of what was asked of it."""
    heard: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(2)
                    heard.append(connection.recv(2048).decode("latin-1").partition("\r\n")[0])

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield server.getsockname()[1], heard
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def open_page(folder: Path, text: str, *how: str) -> tuple[str, list[str]]:
    """Open the text as a page; what chromium printed, and what it asked of the network for it."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    with proxy() as (port, heard):
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
                f"--user-data-dir={folder / 'browser'}", f"--proxy-server=127.0.0.1:{port}", *how,
                (folder / "page.html").as_uri(),
            ],
            capture_output=True, text=True, timeout=PATIENCE_S, cwd=folder,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in heard if SMUGGLED in line or "evil.test" in line]


def test_a_page_that_asks_for_something_is_heard(tmp_path: Path) -> None:
    """The control: without our policy the browser does ask, and this listener hears it."""
    _, heard = open_page(tmp_path, f"<!DOCTYPE html><p>x</p>{ASKS}", "--dump-dom")
    assert heard != []


def test_the_policy_stops_whatever_was_smuggled_into_the_page(tmp_path: Path) -> None:
    page = report_page(report())
    assert POLICY in page
    _, heard = open_page(tmp_path, page.replace("</body>", f"{ASKS}</body>"), "--dump-dom")
    assert heard == []


def test_a_report_renders_and_asks_for_nothing(tmp_path: Path) -> None:
    shown, heard = open_page(
        tmp_path, report_page(make([hostile(), *(b.profile for b in report().boards)], NOW)), "--dump-dom"
    )
    assert heard == []
    assert shown.count("</svg>") >= 8 and shown.rstrip().endswith("</html>")
    assert "<script" not in shown


def test_a_report_prints_on_pages(tmp_path: Path) -> None:
    open_page(tmp_path, report_page(report()), f"--print-to-pdf={tmp_path / 'report.pdf'}")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF") and data.count(b"/Type /Page\n") + data.count(b"/Type /Page/") >= 4
