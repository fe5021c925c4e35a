"""What goes wrong, as a user meets it: the real program, one clear error of two lines, the right exit code, and the
next good request works."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site, edgelam, running_site, write_tiny_model
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from wire.broker import Broker, start_broker
from wire.errors import ExitCode

Done = subprocess.CompletedProcess[str]

COMMANDS = {"plan": ("plan",), "run": ("run", "--prompt", "hello world", "--raw", "--max-tokens", "4")}
BOARD_MEMORY_BYTES = 128 << 20
"""Enough for a worker and a tiny stage, and not for a block of `too_big`."""


class Shop:
    """A site on a broker of somebody else, with small boards; and models, good and bad, by name."""

    def __init__(self, site: Site, broker: Broker, folder: Path) -> None:
        self.site = site
        self.broker = broker
        self.good = write_tiny_model(folder)
        data = self.good.read_bytes()
        self.models = {"unknown": "no-such-model"}
        for name, content in (("truncated", data[: len(data) // 2]), ("mamba", data.replace(b"llama", b"mamba"))):
            path = folder / f"{name}.gguf"
            path.write_bytes(content)
            self.models[name] = str(path)
        config = tiny_config("llama", blocks=1, hidden=1024, ffn=4096, heads=16, kv_heads=16, head_dim=64)
        self.models["too-big"] = str(write_gguf(folder / "too-big.gguf", config, random_tensors(config), "Q8_0"))

    def ask(self, command: str, model: str) -> Done:
        first, *more = COMMANDS[command]
        return self.site.cli(first, model, *more, "--context", "128", "--precision", "f32")

    def assert_serves(self) -> None:
        for command in COMMANDS:
            done = self.ask(command, str(self.good))
            assert done.returncode == int(ExitCode.OK), done.stderr
            assert done.stdout


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    broker = start_broker(folder / "broker", "127.0.0.1", 0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EDGELAM_CACHE", str(folder / "cache"))
            with running_site(folder / "site", 2, ("--broker", broker.url), BOARD_MEMORY_BYTES) as site:
                yield Shop(site, broker, folder)
    finally:
        broker.stop()


def error_of(done: Done, code: ExitCode) -> str:
    """The two lines of a failure, after status lines; nothing on stdout, no traceback. Gives the two lines."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("... ")]
    assert done.returncode == int(code), done.stderr
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("edgelam: ") and lines[1].startswith("  try: "), done.stderr
    assert len(lines[1]) > len("  try: "), "a hint that says nothing"
    assert not done.stdout
    return "\n".join(lines)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("unknown", ExitCode.USAGE, ("no-such-model", "smollm2")),
        ("truncated", ExitCode.FAILED, ("truncated.gguf", "the file ends at", "fetch the file again")),
        ("mamba", ExitCode.REFUSED, ("mamba.gguf", "architecture 'mamba' is not supported", "Qwen3")),
        ("too-big", ExitCode.REFUSED, ("too-big.gguf", "fits on no board", " may give ", "MB short", "more memory")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_can_not_run_is_said_with_what_is_wrong_with_it(
    command: str, model: str, code: ExitCode, words: tuple[str, ...], shop: Shop
) -> None:
    told = error_of(shop.ask(command, shop.models[model]), code)
    assert [word for word in words if word not in told] == [], told


def test_after_models_that_can_not_run_a_good_one_runs(shop: Shop) -> None:
    shop.assert_serves()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_site_without_a_coordinator_is_said_by_the_program(command: str, tmp_path: Path) -> None:
    first, *more = COMMANDS[command]
    told = error_of(edgelam(tmp_path, first, "smollm2", *more), ExitCode.UNREACHABLE)
    assert "no coordinator is running here" in told
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        told = error_of(edgelam(tmp_path, first, "smollm2", *more, "--coordinator", url), ExitCode.UNREACHABLE)
        assert url in told


@pytest.mark.slow
def test_a_broker_that_is_gone_for_good_is_named_and_its_return_is_enough(shop: Shop) -> None:
    shop.assert_serves()
    shop.broker.stop()
    for command in COMMANDS:
        began_s = time.monotonic()
        told = error_of(shop.ask(command, str(shop.good)), ExitCode.UNREACHABLE)
        assert f"the broker at {shop.broker.url} is gone" in told
        assert time.monotonic() - began_s < 30
    devices = shop.site.cli("devices")
    assert "the broker at" in devices.stdout, "a notice says it too"
    shop.broker.start()
    shop.site.await_states({"board1": "online", "board2": "online"})
    shop.assert_serves()
