"""`edgelam` as a user meets it: exit codes, two lines for a mistake, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, get_args

import httpx
import psutil
import pytest

from coordinator.asked import PRECISIONS
from coordinator.cli import main
from coordinator.client import reason_of
from coordinator.commands import model as model_commands
from coordinator.commands import topics
from coordinator.commands.common import Precision
from coordinator.config import Address, write_address
from coordinator.planning.aims import OBJECTIVES
from coordinator.planning.plan import Objective
from testbed import commands as testbeds
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from wire.broker import start_broker
from wire.errors import ExitCode
from wire.topics import TABLE
from wire.version import VERSION

PATIENCE_S = 60.0


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Run:
    """Runs `edgelam` in a state folder of its own, with nothing of the user's environment that it would heed: in this
    process, which is quick, or as a process of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        for name in [name for name in os.environ if name.startswith("EDGELAM_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("EDGELAM_STATE", str(folder / "state"))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["edgelam", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, printed.out, printed.err)

    def setenv(self, name: str, value: str) -> None:
        self._monkeypatch.setenv(name, value)

    def process(self, *arguments: str) -> Done:
        done = subprocess.run(
            command(*arguments), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_S
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def log(self) -> str:
        return (self.folder / "log").read_text()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "coordinator.cli", *arguments]


def two_lines(done: Done, code: ExitCode) -> str:
    """A failure that a user can read: two lines on stderr, nothing on stdout, the exit code. Gives the two lines."""
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == int(code), done.stderr
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("edgelam: ") and lines[1].startswith("  try: "), done.stderr
    assert not done.stdout
    return done.stderr


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, monkeypatch, capsys)


@contextmanager
def started(run: Run, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A coordinator that answers."""
    address = run.folder / "state" / "coordinator.json"
    address.unlink(missing_ok=True)
    with (run.folder / "log").open("w") as log:
        process = subprocess.Popen(command("up", "--site", f"t{os.getpid()}", *arguments), stderr=log, text=True)
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while not address.exists():
            assert process.poll() is None and time.monotonic() < deadline_s, run.log()
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_version_is_printed(run: Run) -> None:
    assert run.process("version").stdout == f"{VERSION}\n"
    assert run("--version") == Done(0, f"{VERSION}\n", "")
    assert json.loads(run("version", "--json").stdout)["version"] == VERSION


@pytest.mark.parametrize(
    "arguments",
    [("devices",), ("plan", "smollm2"), ("run", "smollm2", "-p", "x"), ("top", "--once"), ("topics", "tail")],
    ids=lambda arguments: arguments[0],
)
def test_without_a_coordinator_every_client_says_so(arguments: tuple[str, ...], run: Run) -> None:
    assert "edgelam up" in two_lines(run(*arguments), ExitCode.UNREACHABLE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nosuch",), "nosuch"),
        (("model", "nosuch"), "nosuch"),
        (("devices", "--nosuch"), "--nosuch"),
        (("devices", "extra"), "extra"),
        (("run",), "MODEL"),
        (("run", "smollm2", "-p", "x", "--max-tokens", "many"), "--max-tokens"),
        (("run", "smollm2"), "no prompt"),
        (("testbed", "up", "--preset", "nosuch"), "--preset"),
        (("up", "--http-port", "x"), "--http-port"),
        (("up", "--replan", "maybe"), "--replan"),
        (("up", "--model", "smollm2", "--precision", "x"), "precision"),
        (("plan", "smollm2", "--objective", "x"), "--objective"),
        (("topics", "tail", "edgelam/#/x"), "edgelam/#/x"),
        (("topics", "tail", "edgelam/v1+/x"), "edgelam/v1+/x"),
        (("model", "show", "nosuch"), "nosuch"),
        (("model", "show", "./nosuch.gguf"), "nosuch.gguf"),
        (("testbed", "status"), "no testbed"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_gives_two_lines_that_name_it(arguments: tuple[str, ...], words: str, run: Run) -> None:
    assert words.lower() in two_lines(run(*arguments), ExitCode.USAGE).lower()


def test_without_any_command_there_is_help(run: Run) -> None:
    done = run()
    assert done.returncode == int(ExitCode.USAGE)
    assert "Traceback" not in done.stderr
    assert "edgelam demo" in " ".join((done.stdout + done.stderr).split())


def test_a_coordinator_that_is_gone_is_unreachable(run: Run) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = Address(site="s", boot="b", pid=1, http_url=f"http://127.0.0.1:{port}", mqtt_url="mqtt://x:1", broker="")
    write_address(run.folder / "state", address)
    told = two_lines(run("devices"), ExitCode.UNREACHABLE)
    assert str(port) in told and "(connection refused)" in told


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://127.0.0.1/", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_said(url: str, run: Run) -> None:
    assert "no address of a coordinator" in two_lines(run("devices", "--coordinator", url), ExitCode.USAGE)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx.ConnectError("[Errno 111] Connection refused"), "connection refused"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "name or service not known"),
        (httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)"), "does not speak TLS"),
        (httpx.ReadTimeout("timed out"), "no answer in time"),
        (httpx.ReadError(""), "broke off"),
    ],
)
def test_why_a_coordinator_is_not_reached_is_said_in_words(error: httpx.HTTPError, words: str) -> None:
    assert words in reason_of(error)
    assert not set("[]") & set(reason_of(error))


def test_something_that_is_no_coordinator_is_said(run: Run) -> None:
    page = (
        "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler); "
        "print(s.server_port, flush=True); s.serve_forever()"
    )
    with subprocess.Popen([sys.executable, "-c", page], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            done = run("devices", "--coordinator", f"http://127.0.0.1:{port}")
            assert "not answer like a coordinator" in two_lines(done, ExitCode.UNREACHABLE)
        finally:
            server.kill()


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", "schl\u00fcssel".encode(), b"two\nlines"])
def test_a_site_key_that_can_not_be_one_is_the_users_mistake(content: bytes | None, run: Run) -> None:
    key = run.folder / "site.key"
    if content is not None:
        key.write_bytes(content)
    done = run("devices", "--coordinator", "http://127.0.0.1:9", "--site-key-file", str(key))
    two_lines(done, ExitCode.USAGE)


def test_all_topics_are_listed(run: Run) -> None:
    listed = json.loads(run("topics", "list", "--json").stdout)
    assert listed["schema"] == "edgelam.topics/1"
    assert [row["template"] for row in listed["topics"]] == [row.template for row in TABLE]
    assert all(row.template in run("topics", "list").stdout for row in TABLE[:1])


def test_all_models_are_listed(run: Run) -> None:
    listed = json.loads(run("model", "list", "--json").stdout)
    assert listed["schema"] == "edgelam.models/1"
    assert all({"name", "licence", "cached"} <= set(model) for model in listed["models"])


def test_the_cache_is_listed_and_emptied(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(run.folder / "cache"))
    assert "nothing" in run("model", "cache").stdout
    checkpoint = run.folder / "cache" / "models" / "some" / "some.gguf"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(bytes(2048))
    listed = json.loads(run("model", "cache", "--json").stdout)
    assert [(entry["name"], entry["size_bytes"]) for entry in listed["entries"]] == [("models/some", 2048)]
    assert "models/some" in run("model", "cache").stdout
    assert "not in the cache" in two_lines(run("model", "remove", "some"), ExitCode.USAGE)
    assert "models/some" in run("model", "remove", "models/some").stdout
    assert not checkpoint.exists()


def test_codecs_are_measured_on_the_users_own_text_kept_and_shown_again(run: Run) -> None:
    run.setenv("EDGELAM_CACHE", str(run.folder / "cache"))
    config = tiny_config()
    model, text = run.folder / "tiny.gguf", run.folder / "own.txt"
    write_gguf(model, config, random_tensors(config))
    text.write_text("hello world and more words " * 40)
    measure = ("model", "codecs", str(model), "--text", str(text), "--tokens", "300")
    first = run(*measure, "--json")
    report = json.loads(first.stdout)
    assert (report["schema"], report["tokens"], report["text"]) == ("edgelam.codecs/1", 300, "own.txt")
    assert "trials over 300 tokens" in first.stderr and "kept in" in first.stderr
    assert json.loads(run(*measure, "--json").stdout) == report, "not measured again"
    shown = run(*measure, "--again")
    assert "kept in" in shown.stderr and "int8-group" in shown.stdout and "cuts behind block" in shown.stdout
    assert "tokens, 256 are needed" in two_lines(run(*measure[:-1], "20", "--again"), ExitCode.USAGE)
    assert "--seconds" in two_lines(run(*measure, "--again", "--seconds", "0.00001"), ExitCode.REFUSED)
    text.write_bytes(bytes([255, 254]))
    assert "UTF-8" in two_lines(run(*measure), ExitCode.USAGE)
    assert "no time" in two_lines(run(*measure, "--seconds", "0"), ExitCode.USAGE)


def test_fetching_a_model_gives_one_document(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(name: str, cache: Path, progress: Callable[[str], None]) -> Path:
        progress("fetching")
        return cache / f"{name}.gguf"

    monkeypatch.setattr(model_commands, "fetch", fetched)
    done = run("model", "fetch", "some", "--json")
    assert json.loads(done.stdout)["path"].endswith("some.gguf")
    assert "fetching" in done.stderr


def test_a_testbed_gives_one_document_going_up_and_one_going_down(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    board = testbeds.BoardStatus(name="pi4", pid=7, state="running", is_="slow", log="/log")
    shown = testbeds.TestbedStatus(site="lab", coordinator="", kept=True, boards=(board,), warnings=("loud",))

    class Up:
        boards = ()
        warnings = shown.warnings

        def await_connected(self, say: Callable[[str], None]) -> None:
            say("1 of 1 boards connected")

        def status(self) -> testbeds.TestbedStatus:
            return shown

    monkeypatch.setattr(testbeds, "up", lambda _options: Up())
    done = run("testbed", "up", "--detach", "--site", "lab", "--json")
    assert json.loads(done.stdout)["boards"][0]["name"] == "pi4"
    assert "loud" in done.stderr and "edgelam testbed down --site lab" in done.stderr
    assert json.loads(run("testbed", "down", "--json").stdout)["was_up"] is False


def completions(run: Run, *words: str) -> set[str]:
    """What the shell is told for the last word."""
    asked = {
        "_EDGELAM_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("edgelam", *words)),
        "COMP_CWORD": str(len(words)),
    }
    for name, value in asked.items():
        run.setenv(name, value)
    return set(run().stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("plan", "smollm2", "--precision", "int"), {"int4", "int8"}),
        (("run", "smollm2", "--objective", "th"), {"throughput"}),
        (("bench", "--precision", "f"), {"f32"}),
        (("up", "--precision", "f"), {"f32"}),
        (("up", "--replan", "o"), {"on", "off"}),
        (("testbed", "up", "--preset", "sh"), {"shelf"}),
        (("testbed", "up", "--link", "eth"), {"ethernet"}),
        (("demo", "--link", "wi"), {"wifi"}),
        (("run", "smollm2-135m-"), {"smollm2-135m-instruct"}),
        (("plan", "smollm2-135m-"), {"smollm2-135m-instruct"}),
        (("model", "fetch", "smollm2-135m-"), {"smollm2-135m-instruct"}),
        (("up", "--model", "smollm2-135m-"), {"smollm2-135m-instruct"}),
    ],
    ids=lambda given: " ".join(sorted(given) if isinstance(given, set) else given),
)
def test_the_shell_completes_values_and_models(words: tuple[str, ...], offered: set[str], run: Run) -> None:
    assert completions(run, *words) == offered


def test_what_the_command_line_offers_is_what_the_coordinator_takes() -> None:
    assert set(get_args(get_args(Precision)[0])) == set(PRECISIONS)
    assert set(get_args(Objective)) == set(OBJECTIVES)


def test_a_reader_that_goes_away_is_nobodys_error(run: Run) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        command("topics", "list"), stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


# edgelam up.


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody has."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        yield door.getsockname()[1]


@pytest.mark.parametrize("option", ["--http-port", "--mqtt-port"])
def test_up_says_that_a_port_is_taken(option: str, taken: int, run: Run) -> None:
    assert str(taken) in two_lines(run("up", option, str(taken)), ExitCode.USAGE)
    assert not (run.folder / "state" / "coordinator.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--state", "/dev/null/state"),
        ("--site", "Not A Name"),
        ("--listen", "256.1.1.1"),
        ("--http-port", "99999"),
        ("--broker", "nonsense"),
    ],
    ids=" ".join,
)
def test_up_refuses_options_that_can_not_work(arguments: tuple[str, str], run: Run) -> None:
    assert arguments[1] in two_lines(run("up", *arguments), ExitCode.USAGE)


def test_up_prints_one_document_when_it_can_be_reached_and_runs_on(run: Run) -> None:
    with subprocess.Popen(
        command("up", "--site", f"t{os.getpid()}", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as up:
        try:
            assert up.stdout is not None
            told = json.loads(up.stdout.readline())
            assert told["schema"] == "edgelam.up/1" and told["pid"] == up.pid
            assert "no devices yet" in run("devices", "--coordinator", told["http_url"]).stdout
            up.send_signal(signal.SIGTERM)
            assert up.stdout.read() == "" and up.wait(PATIENCE_S) == int(ExitCode.OK)
        finally:
            up.kill()


def test_plan_says_at_once_that_it_waits_for_boards(run: Run) -> None:
    config = tiny_config()
    model = run.folder / "tiny.gguf"
    write_gguf(model, config, random_tensors(config))
    run.setenv("EDGELAM_CACHE", str(run.folder / "cache"))
    with started(run):
        with subprocess.Popen(
            command("plan", str(model), "--context", "64"), stderr=subprocess.PIPE, text=True
        ) as plan:
            try:
                assert plan.stderr is not None
                said: list[str] = []
                while not any("waiting for boards: none" in line for line in said):
                    line = plan.stderr.readline()
                    assert line, said
                    said.append(line)
                assert plan.poll() is None, "it goes on waiting"
            finally:
                plan.kill()
        numbers = (("--context", "0"), ("--boards-at-least", "0"), ("--slots", "0"), ("--error-budget", "101"))
        wishes = (("--pin", "head"), ("--objective", "weighted"), ("--reserve", "95"), ("--engine", "x"))
        for option in (*numbers, *wishes):
            two_lines(run("plan", str(model), *option), ExitCode.USAGE)
        for option in (("--context", "1"), ("--slots", "0"), ("--slots", "257")):
            two_lines(run("run", str(model), "-p", "Hi", *option), ExitCode.USAGE)


def test_up_serves_its_clients_refuses_a_second_one_and_leaves_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(run) as up:
        assert "no devices yet" in run("devices").stdout
        assert json.loads(run("top", "--json").stdout)["status"]["broker_up"] is True
        monkeypatch.setattr(topics, "CONNECT_TIMEOUT_S", 0.5)
        blamed = two_lines(run("topics", "tail", "--broker", "mqtt://127.0.0.1:1"), ExitCode.UNREACHABLE)
        assert "mqtt://127.0.0.1:1:" in blamed and "--broker" in blamed
        assert "runs already" in two_lines(run.process("up"), ExitCode.REFUSED)
        assert "coordinator runs here" in two_lines(run("model", "remove", "packs/x"), ExitCode.REFUSED)
        children = psutil.Process(up.pid).children(recursive=True)
        assert children, "a broker"
        up.send_signal(signal.SIGINT)
        assert up.wait(PATIENCE_S) == int(ExitCode.INTERRUPTED)
    assert "Traceback" not in run.log()
    assert not (run.folder / "state" / "coordinator.json").exists()
    assert not psutil.wait_procs(children, 5)[1]


SLOW_PACKER = """
import textwrap
import time
from models.build import pack
quick = pack.module_tensors
def slow(*arguments):
    time.sleep(0.3)
    return quick(*arguments)
pack.module_tensors = slow
from coordinator.cli import main
from coordinator.commands import topics
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_ends_at_once_while_it_packs_a_model(number: signal.Signals, run: Run) -> None:
    config = tiny_config(blocks=60)  # 18 s of packing
    model = run.folder / "tiny.gguf"
    write_gguf(model, config, random_tensors(config))
    cache = run.folder / "cache"
    with (run.folder / "log").open("w") as log:
        up = subprocess.Popen(
            [sys.executable, "-c", SLOW_PACKER, "up", "--site", f"t{os.getpid()}", "--model", str(model)],
            env={**os.environ, "EDGELAM_CACHE": str(cache)},
            stderr=log,
        )
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while not list(cache.glob("packs/*/*.safetensors")):
            assert up.poll() is None and time.monotonic() < deadline_s, run.log()
            time.sleep(0.02)
        told_s = time.monotonic()
        up.send_signal(number)
        up.wait(PATIENCE_S)
        assert time.monotonic() - told_s < 9, "half of what packing takes"
    finally:
        up.kill()
        up.wait()
    assert "Traceback" not in run.log()
    assert not list(cache.glob("packs/*/index.json")), "nobody takes it for whole"


def test_a_killed_coordinator_does_not_stand_in_the_way_of_the_next(run: Run) -> None:
    address = run.folder / "state" / "coordinator.json"
    with started(run) as up:
        up.kill()
        up.wait()
        # The process id of the dead may be somebody else's by now.
        stale = json.loads(address.read_text())
        address.write_text(json.dumps({**stale, "pid": os.getpid()}))
    two_lines(run("devices"), ExitCode.UNREACHABLE)
    with started(run):
        assert "no devices yet" in run("devices").stdout


def test_up_outlives_a_broker_of_somebody_else(run: Run, tmp_path: Path) -> None:
    broker = start_broker(tmp_path / "broker", "127.0.0.1", 0)
    try:
        with started(run, "--broker", broker.url) as up:
            broker.stop()
            deadline_s = time.monotonic() + PATIENCE_S
            while json.loads(run("top", "--json").stdout)["status"]["broker_up"]:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            assert "broker" in run("devices").stdout, "a notice says it"
            broker.start()
            while not json.loads(run("top", "--json").stdout)["status"]["broker_up"]:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            up.send_signal(signal.SIGTERM)
            assert up.wait(PATIENCE_S) == int(ExitCode.OK)
    finally:
        broker.stop()


def test_ctrl_c_while_the_commands_are_imported_is_one_line_and_its_exit_code() -> None:
    code = textwrap.dedent("""
        import sys
        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "typer":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupting())
        from coordinator.__main__ import main
        main()
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "edgelam: interrupted\n")
