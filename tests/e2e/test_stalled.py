"""Clients that stop reading: others are served as before, nothing grows, and who comes back finds every token."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from testbed.site import until
from tests.e2e.site import Site
from tests.models.tiny import random_tensors, tiny_config, write_gguf

CLIENTS = 4
TOKENS = 700
SLOTS = 2
"""Fewer than clients: who stalls must not keep a turn."""
SETTINGS: dict[str, Any] = {"context_tokens": 1024, "slots": SLOTS}
GROWS_BYTES = 16_000_000
"""Of any process, over what it took with clients that read. What waits for four clients is less than a tenth of it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny one, with room for long answers."""
    config = tiny_config("llama", max_context=SETTINGS["context_tokens"])
    path = tmp_path_factory.mktemp("models") / "long.gguf"
    return str(write_gguf(path, config, random_tensors(config), "F32"))


class Caller:
    """A client with small buffers that has asked at one of the doors, and reads when it is told to."""

    def __init__(self, site: Site, path: str, body: dict[str, Any]) -> None:
        host, port = site.address["http_url"].removeprefix("http://").split(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=60.0)
        self._connection.sock = socket.socket()
        self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._connection.sock.settimeout(60.0)
        self._connection.sock.connect((host, int(port)))
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})

    def read(self) -> list[dict[str, Any]]:
        """Everything, to the end: the objects of lines and of server-sent events."""
        text = self._connection.getresponse().read().decode()
        lines = [line.removeprefix("data: ") for line in text.splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def close(self) -> None:
        self._connection.close()


@contextmanager
def callers(site: Site, model: str, tokens: int) -> Iterator[list[Caller]]:
    """Half of them at each door."""
    own = {"model": model, "prompt": "hello world", "raw": True, "max_tokens": tokens, "ignore_stop": True,
           "boards_at_least": 2, "boards_at_most": 2, **SETTINGS}  # fmt: skip
    openais = {"model": model, "prompt": "hello world", "temperature": 0, "max_tokens": tokens, "stream": True}
    made = [
        Caller(site, *(("/v1/generate", own) if number % 2 else ("/v1/completions", openais)))
        for number in range(CLIENTS)
    ]
    try:
        yield made
    finally:
        for one in made:
            one.close()


def busy(site: Site) -> int:
    """Requests that run or wait for their turn."""
    page = httpx.get(f"{site.address['http_url']}/metrics").text
    names = ("edgelam_requests_live ", "edgelam_requests_waiting ")
    return sum(int(float(line.split(" ")[1])) for line in page.splitlines() if line.startswith(names))


def resident(site: Site) -> dict[int, int]:
    """Process -> bytes, of coordinator, boards and all that they started."""
    roots = [site.get("/v1/status")["pid"], *(board.pid for board in site.boards.status().boards)]
    found = [psutil.Process(root) for root in roots]
    every = [*found, *(child for one in found for child in one.children(recursive=True))]
    return {process.pid: process.memory_info().rss for process in every}


@pytest.mark.slow
def test_clients_that_stop_reading_hold_nothing_up_and_find_all_when_they_come_back(site: Site, model: str) -> None:
    fields: dict[str, Any] = {"prompt": "hello world", **SETTINGS}
    whole = site.run(model, 2, max_tokens=TOKENS, **fields)
    with callers(site, model, TOKENS) as readers:
        threads = [threading.Thread(target=one.read) for one in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    before = resident(site)

    with callers(site, model, TOKENS) as stalled:
        until(lambda: busy(site) == CLIENTS, 20.0, "all have asked")
        other = site.run(model, 2, max_tokens=40, **fields)
        assert len(other["token_ids"]) == 40, "it had its turn though nobody else reads"
        until(lambda: busy(site) == 0, 60.0, "the stages are done with those that do not read")
        after = resident(site)
        assert after.keys() == before.keys()
        grown = {process: after[process] - before[process] for process in after}
        assert max(grown.values()) < GROWS_BYTES
        for number, one in enumerate(stalled):
            events = one.read()
            if number % 2:
                assert [event["id"] for event in events if event["event"] == "token"] == whole["token_ids"]
                assert events[-1]["event"] == "end" and events[-1]["text"] == whole["text"]
            else:
                text = "".join(choice["text"] for event in events for choice in event["choices"])
                assert text == whole["text"] or (whole["text"].startswith(text) and _stopped(events))


def _stopped(events: list[dict[str, Any]]) -> bool:
    """OpenAI's door ends at a stop token."""
    return [choice["finish_reason"] for event in events for choice in event["choices"]][-1] == "stop"


def test_a_stalled_client_that_leaves_ends_what_it_asked_for(site: Site, model: str) -> None:
    site.run(model, 2, max_tokens=2, prompt="hello world", **SETTINGS)
    with callers(site, model, TOKENS):
        until(lambda: busy(site) == CLIENTS, 20.0, "all have asked")
    until(lambda: busy(site) == 0, 10.0, "their requests end with them")
    answer = site.run(model, 2, max_tokens=2, prompt="hello world", **SETTINGS)
    assert len(answer["token_ids"]) == 2, "and whoever asks next is answered"
