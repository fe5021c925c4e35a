"""Fetches artifacts over HTTP into the store: one at a time, resumed where it stopped, believed only by digest.

One thread does it, since a board has one link. `want` hands over refs; results come back through `drain` in the
caller's thread, and `wake` is called when there are some. What can be cured by waiting (no connection, 5xx, a
coordinator that restarts) is tried again for ever with a growing pause; what can't (no room, a wrong digest three
times, 404) is reported as failed and tried again every FAILED_RETRY_S, as somebody may have made room.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit, urlunsplit

from msgspec import Struct

from agent.config import HostPort
from agent.store import Store, StoreFull, digest_of
from wire.errors import CorruptData, EdgelamError
from wire.messages import ArtifactRef

LOG = logging.getLogger("edgelam.fetch")

READ_BYTES: Final = 256 * 1024
SOCKET_TIMEOUT_S: Final = 10.0
"""Silence for so long means that the connection is dead; the rest is resumed on a new one."""

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 5.0
FAILED_RETRY_S: Final = 30.0
MAX_MISMATCHES: Final = 3
PROGRESS_PERIOD_S: Final = 0.5


class Progress(Struct, frozen=True):
    """`failed` '' = still at it. `have_bytes` of this one artifact."""

    digest: str
    have_bytes: int
    done: bool = False
    failed: str = ""
    note: str = ""


class _Hopeless(EdgelamError):
    """Trying again at once would end the same way."""


def artifact_url(base_url: str, digest: str, via: HostPort | None, broker_host: str) -> str:
    """Where an artifact is. `via` replaces host and port; a base that names no real host means the broker's host.

    Raise ValueError for anything but http and https.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"artifacts from {base_url!r}: only http and https are fetched")
    netloc, port = parts.netloc, parts.port or 80  # raises ValueError for what is no port
    if via is not None:
        netloc = str(via)
    elif parts.hostname in (None, "0.0.0.0", "::"):
        netloc = str(HostPort(broker_host, port))
    path = parts.path.rstrip("/")
    if not path.endswith("/v1/artifacts"):
        path += "/v1/artifacts"
    return urlunsplit((parts.scheme, netloc, f"{path}/{digest}", "", ""))


class Fetcher:
    """`token` is the site's key, sent as a Bearer token; '' sends none."""

    def __init__(
        self, store: Store, wake: Callable[[], None], token: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._wake = wake
        self._token = token
        self._clock = clock
        self._wanted: OrderedDict[str, tuple[ArtifactRef, str]] = OrderedDict()
        self._failed_until_s: dict[tuple[str, str], float] = {}
        """(digest, URL): what one address does not give, another may."""
        self._results: deque[Progress] = deque()
        self._mutex = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        # A proxy in the environment is for the internet, not for the coordinator next door.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def want(self, refs: Iterable[ArtifactRef], url_of: Callable[[str], str]) -> None:
        """Fetch these; what is under way goes on from the new address if that is another one (a coordinator may come
        back elsewhere). What failed lately is left alone until its pause is over."""
        now_s = self._clock()
        with self._mutex:
            for ref in refs:
                try:
                    url = url_of(ref.digest)
                except ValueError as error:  # what a message called an address is none
                    self._wanted.pop(ref.digest, None)
                    self._results.append(Progress(ref.digest, 0, failed=str(error)))
                    continue
                if self._failed_until_s.get((ref.digest, url), 0.0) <= now_s:
                    self._wanted[ref.digest] = (ref, url)
            if self._wanted and self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
                self._thread.start()
            self._mutex.notify()

    def only(self, digests: Iterable[str]) -> None:
        """Give up what is not among `digests`; parts stay for later."""
        keep = set(digests)
        with self._mutex:
            for digest in [digest for digest in self._wanted if digest not in keep]:
                del self._wanted[digest]
            self._failed_until_s = {key: until for key, until in self._failed_until_s.items() if key[0] in keep}
            self._mutex.notify()

    def drain(self) -> list[Progress]:
        """What happened since the last call, in order."""
        found = []
        while self._results:
            found.append(self._results.popleft())
        return found

    def close(self) -> None:
        """Stop soon; a download under way ends at its next piece."""
        with self._mutex:
            self._stopping = True
            self._wanted.clear()
            self._mutex.notify()
        if self._thread is not None:
            self._thread.join(2.0)

    # The thread.

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        mismatches: dict[str, int] = {}
        while (job := self._next()) is not None:
            ref, url = job
            before_bytes = self._have_bytes(ref)
            try:
                self._obtain(ref, url)
            except CorruptData as error:
                mismatches[ref.digest] = mismatches.get(ref.digest, 0) + 1
                if mismatches[ref.digest] < MAX_MISMATCHES:
                    LOG.warning("%s; trying again", error.message)
                    continue
                mismatches.pop(ref.digest)
                self._give_up(ref, url, error.message)
            except (StoreFull, _Hopeless) as error:
                self._give_up(ref, url, error.message)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    self._store.part_of(ref.digest).unlink(missing_ok=True)
                    self._give_up(ref, url, f"cache {self._store.folder}: {error.strerror}")
                    continue
                have_bytes = self._have_bytes(ref)
                pause_s = FIRST_PAUSE_S if have_bytes > before_bytes else min(2 * pause_s, LONGEST_PAUSE_S)
                self._tell(Progress(ref.digest, have_bytes, note=f"{_host(url)}: {_why(error)}; trying again"))
                self._rest(FIRST_PAUSE_S if self._others_first(ref) else pause_s)
            else:
                pause_s = FIRST_PAUSE_S

    def _next(self) -> tuple[ArtifactRef, str] | None:
        with self._mutex:
            while not self._wanted and not self._stopping:
                self._mutex.wait()
            return None if self._stopping else next(iter(self._wanted.values()))

    def _others_first(self, ref: ArtifactRef) -> bool:
        """What can't be had now goes behind the rest, which may come from elsewhere; False if there is no rest."""
        with self._mutex:
            if ref.digest in self._wanted:
                self._wanted.move_to_end(ref.digest)
            return len(self._wanted) > 1

    def _rest(self, pause_s: float) -> None:
        with self._mutex:
            if not self._stopping:
                self._mutex.wait(pause_s)

    def _give_up(self, ref: ArtifactRef, url: str, reason: str) -> None:
        with self._mutex:
            if self._wanted.get(ref.digest) == (ref, url):
                del self._wanted[ref.digest]
            self._failed_until_s[ref.digest, url] = self._clock() + FAILED_RETRY_S
        self._tell(Progress(ref.digest, 0, failed=reason))

    def _finish(self, ref: ArtifactRef) -> None:
        with self._mutex:
            self._wanted.pop(ref.digest, None)
            for key in [key for key in self._failed_until_s if key[0] == ref.digest]:
                del self._failed_until_s[key]
        self._tell(Progress(ref.digest, ref.size_bytes, done=True))

    def _tell(self, progress: Progress) -> None:
        self._results.append(progress)
        self._wake()

    def _have_bytes(self, ref: ArtifactRef) -> int:
        try:
            return self._store.part_of(ref.digest).stat().st_size
        except OSError:
            return 0

    def _obtain(self, ref: ArtifactRef, url: str) -> None:
        if self._store.verify(ref):
            self._finish(ref)
            return
        self._store.make_room(ref)
        with self._store.part_of(ref.digest).open("a+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConnectionError("another agent is fetching it into the same cache") from None
            if part.tell() > ref.size_bytes:
                part.truncate(0)
            if part.tell() < ref.size_bytes:
                self._download(ref, url, part)
            part.flush()
            os.fsync(part.fileno())
            if part.tell() != ref.size_bytes:
                return  # Given up in the middle; the part stays.
            part.seek(0)
            digest = digest_of(part)
        self._store.adopt(ref, digest)
        self._finish(ref)

    def _download(self, ref: ArtifactRef, url: str, part: BinaryIO) -> None:
        """Append to `part` what it lacks, never more than was declared."""
        part.seek(0, os.SEEK_END)
        have_bytes = part.tell()
        headers = {"Range": f"bytes={have_bytes}-"} if have_bytes else {}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        with self._open(url, headers, part) as answer:
            if have_bytes and not _continues_at(answer, have_bytes):
                part.truncate(0)
                have_bytes = 0
            next_tell_s = 0.0
            while piece := answer.read(min(READ_BYTES, ref.size_bytes - have_bytes + 1)):
                have_bytes += len(piece)
                if have_bytes > ref.size_bytes:
                    part.truncate(0)
                    raise CorruptData(f"artifact {ref.name or ref.digest[:20]}: longer than its {ref.size_bytes} bytes")
                part.write(piece)
                if self._clock() >= next_tell_s:
                    next_tell_s = self._clock() + PROGRESS_PERIOD_S
                    self._tell(Progress(ref.digest, have_bytes))
                    if ref.digest not in self._wanted:
                        return
            if have_bytes < ref.size_bytes:
                raise ConnectionError(f"ended after {have_bytes} of {ref.size_bytes} bytes")

    def _open(self, url: str, headers: dict[str, str], part: BinaryIO) -> Any:
        try:
            return self._opener.open(urllib.request.Request(url, headers=headers), timeout=SOCKET_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                part.truncate(0)
                raise ConnectionError("the part on disk does not fit; starting over") from None
            if 400 <= error.code < 500 and error.code not in (408, 425, 429):
                hint = "is the site key right?" if error.code in (401, 403) else "the coordinator does not have it"
                raise _Hopeless(f"{_host(url)}: HTTP {error.code}: {hint}") from None
            raise ConnectionError(f"HTTP {error.code}") from None


def _continues_at(answer: Any, offset: int) -> bool:
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return answer.status == 206 and found is not None and int(found[1]) == offset


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or str(reason) or type(error).__name__
