"""The cache, and how files come into it, against a small HTTP server that misbehaves."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agent import fetch
from agent.fetch import Fetcher, Progress
from agent.store import SPARE_BYTES, Store, StoreFull
from tests.agent.fakes import ref_of
from wire.messages import ArtifactRef

MB = 1 << 20
BIG = os.urandom(3 * MB)


class Server:
    """Serves `files` by digest. Faults: `cut` ends each answer early, `lie` sends other bytes, `codes` come first."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_bytes = 0
        self.lie = False
        self.ranges = True
        self.codes: list[int] = []
        self.asked: list[tuple[str, str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                digest = self.path.rsplit("/", 1)[-1]
                asked_range = self.headers.get("Range", "")
                server.asked.append((digest, asked_range, self.headers.get("Authorization", "")))
                data = server.files.get(digest)
                code = server.codes.pop(0) if server.codes else (404 if data is None else 200)
                if code != 200:
                    self.send_error(code)
                    return
                assert data is not None
                start = 0
                if asked_range and server.ranges:
                    start = int(asked_range.removeprefix("bytes=").rstrip("-"))
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                else:
                    self.send_response(200)
                body = data[start:]
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                body = bytes(len(body)) if server.lie else body
                self.wfile.write(body[: server.cut_bytes] if server.cut_bytes else body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1/artifacts/"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, data: bytes) -> ArtifactRef:
        ref = ref_of(data, "file")
        self.files[ref.digest] = data
        return ref

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, 100 * MB)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_S", 0.02)


def outcome(fetcher: Fetcher, server: Server, *refs: ArtifactRef) -> dict[str, Progress]:
    """Fetch until each ref is done or failed."""
    fetcher.want(refs, lambda digest: server.url + digest)
    found: dict[str, Progress] = {}
    deadline_s = time.monotonic() + 10
    while len(found) < len(refs):
        assert time.monotonic() < deadline_s
        for progress in fetcher.drain():
            if progress.done or progress.failed:
                found[progress.digest] = progress
        time.sleep(0.005)
    fetcher.close()
    return found


def test_what_is_wanted_comes_and_is_what_was_wanted(server: Server, store: Store) -> None:
    refs = [server.add(BIG), server.add(b"small"), server.add(b"")]
    found = outcome(Fetcher(store, lambda: None, "secret"), server, *refs)
    assert all(progress.done for progress in found.values())
    assert store.present == {ref.digest for ref in refs} and store.path_of(refs[0].digest).read_bytes() == BIG
    assert {asked[2] for asked in server.asked} == {"Bearer secret"}


def test_a_download_that_breaks_off_is_resumed_where_it_stopped(server: Server, store: Store) -> None:
    ref = server.add(BIG)
    server.cut_bytes = MB + 1
    assert outcome(Fetcher(store, lambda: None), server, ref)[ref.digest].done
    starts = [int(asked[1].removeprefix("bytes=").rstrip("-") or 0) for asked in server.asked]
    assert starts == sorted(starts) and starts[0] == 0 and len(starts) == 3


def test_a_part_of_the_last_boot_is_resumed(server: Server, store: Store) -> None:
    ref = server.add(BIG)
    store.part_of(ref.digest).write_bytes(BIG[:MB])
    assert outcome(Fetcher(store, lambda: None), server, ref)[ref.digest].done
    assert server.asked[0][1] == f"bytes={MB}-"


def test_a_server_without_ranges_is_read_from_the_start(server: Server, store: Store) -> None:
    ref = server.add(BIG)
    server.ranges = False
    store.part_of(ref.digest).write_bytes(b"x" * MB)
    assert outcome(Fetcher(store, lambda: None), server, ref)[ref.digest].done


def test_a_coordinator_that_restarts_is_waited_for(server: Server, store: Store) -> None:
    ref = server.add(BIG)
    server.codes = [503, 500, 502]
    assert outcome(Fetcher(store, lambda: None), server, ref)[ref.digest].done


def test_other_bytes_than_promised_are_never_stored(server: Server, store: Store) -> None:
    ref = server.add(BIG)
    server.lie = True
    progress = outcome(Fetcher(store, lambda: None), server, ref)[ref.digest]
    assert "digest" in progress.failed and list(store.folder.iterdir()) == [] and store.present == frozenset()
    assert len(server.asked) == fetch.MAX_MISMATCHES


def test_more_bytes_than_declared_are_not_written(server: Server, store: Store) -> None:
    honest = server.add(BIG)
    ref = ArtifactRef(digest=honest.digest, size_bytes=MB)
    progress = outcome(Fetcher(store, lambda: None), server, ref)[ref.digest]
    assert "longer" in progress.failed and store.held_bytes == 0


@pytest.mark.parametrize(("code", "hint"), [(404, "does not have it"), (403, "site key")])
def test_a_refusal_is_told_and_not_hammered(server: Server, store: Store, code: int, hint: str) -> None:
    ref = server.add(b"x")
    server.codes = [code] * 9
    assert hint in outcome(Fetcher(store, lambda: None), server, ref)[ref.digest].failed
    assert len(server.asked) == 1


def test_a_full_disk_is_told_and_leaves_no_part(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = server.add(BIG)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in outcome(Fetcher(store, lambda: None), server, ref)[ref.digest].failed
    assert list(store.folder.iterdir()) == []


def test_what_was_given_up_is_wanted_again_only_after_a_pause(server: Server, store: Store) -> None:
    now = [0.0]
    fetcher = Fetcher(store, lambda: None, clock=lambda: now[0])
    ref = ref_of(b"nowhere")
    fetcher.want([ref], lambda digest: server.url + digest)
    deadline_s = time.monotonic() + 5
    while not any(progress.failed for progress in fetcher.drain()):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    for later_s, asked in ((1.0, 1), (fetch.FAILED_RETRY_S + 1, 2)):
        now[0] = later_s
        fetcher.want([ref], lambda digest: server.url + digest)
        time.sleep(0.1)
        assert len(server.asked) == asked
    fetcher.close()


def test_a_fetch_under_way_follows_a_coordinator_that_comes_back_elsewhere(server: Server, store: Store) -> None:
    ref = server.add(BIG)
    fetcher = Fetcher(store, lambda: None)
    fetcher.want([ref], lambda digest: f"http://127.0.0.1:1/{digest}")
    deadline_s = time.monotonic() + 5
    while not any(progress.note for progress in fetcher.drain()):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    assert outcome(fetcher, server, ref)[ref.digest].done


@pytest.mark.parametrize("base", ["htt0.0.1:1", "file:///etc", "http://[::1", "http://h:99999999", ""])
def test_an_address_that_is_none_is_a_failure_and_no_crash(store: Store, base: str) -> None:
    fetcher = Fetcher(store, lambda: None)
    ref = ref_of(b"x")
    fetcher.want([ref], lambda digest: fetch.artifact_url(base, digest, None, "127.0.0.1"))
    assert [progress.failed != "" for progress in fetcher.drain()] == [True]


def test_a_damaged_file_is_fetched_again(server: Server, store: Store) -> None:
    ref = server.add(BIG)
    store.path_of(ref.digest).write_bytes(BIG[:-1] + b"x")
    assert ref.digest not in store.present, "nothing is believed before it was read in this boot"
    assert outcome(Fetcher(store, lambda: None), server, ref)[ref.digest].done
    assert store.path_of(ref.digest).read_bytes() == BIG


def test_an_intact_file_of_the_last_boot_costs_no_request(server: Server, store: Store) -> None:
    ref = server.add(BIG)
    store.path_of(ref.digest).write_bytes(BIG)
    assert outcome(Fetcher(store, lambda: None), server, ref)[ref.digest].done
    assert server.asked == []


def put(store: Store, data: bytes, used_at: float) -> ArtifactRef:
    ref = ref_of(data)
    store.path_of(ref.digest).write_bytes(data)
    os.utime(store.path_of(ref.digest), (used_at, used_at))
    assert store.verify(ref)
    return ref


def test_room_is_made_by_what_is_unused_for_longest(tmp_path: Path) -> None:
    used: set[str] = set()
    store = Store(tmp_path, 3 * MB, used=lambda: used)
    old, older, busy = put(store, b"a" * MB, 200), put(store, b"b" * MB, 100), put(store, b"c" * MB, 50)
    used.add(busy.digest)
    store.make_room(ref_of(b"d" * MB))
    assert store.present == {old.digest, busy.digest} and not store.path_of(older.digest).exists()
    with pytest.raises(StoreFull, match="no room"):
        store.make_room(ref_of(b"e" * (2 * MB + 1)))
    assert store.path_of(busy.digest).exists()


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path, 100 * MB, free_bytes=lambda folder: SPARE_BYTES + 10)
    store.make_room(ref_of(b"x" * 10))
    with pytest.raises(StoreFull, match="disk"):
        store.make_room(ref_of(b"x" * 11))
