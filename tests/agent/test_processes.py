"""Real processes: workers and their supervisor, the agent as a program, its footprint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.launcher import Ended, Line, ProcessLauncher
from agent.notify import Notifier
from agent.workers.pipe import MeasureNote, Tell, line_of
from tests.agent.stub_worker import Say
from wire import topics
from wire.errors import ExitCode
from wire.messages import DeviceState, Telemetry, decode
from wire.mqtt import MqttTransport
from wire.transport import Inbound

STUB = "tests.agent.stub_worker"
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not come to pass"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# The launcher.


@pytest.fixture
def launcher() -> Iterator[ProcessLauncher]:
    launcher = ProcessLauncher(lambda: None)
    yield launcher
    for pid in launcher.pids:
        os.kill(pid, signal.SIGKILL)


def next_events(launcher: ProcessLauncher, count: int = 1) -> list[Line | Ended]:
    found: list[Line | Ended] = []
    until(lambda: found.extend(launcher.drain()) or len(found) >= count)
    return found


def note_of(event: Line | Ended) -> str:
    assert isinstance(event, Line)
    return msgspec.json.decode(event.text, type=MeasureNote).note


def test_a_worker_hears_and_is_heard_and_ends_when_asked(launcher: ProcessLauncher) -> None:
    worker = launcher.launch(STUB, line_of(Say("talk")), 3)
    pid, threads, session = note_of(next_events(launcher)[0]).split()
    assert (int(pid), int(threads)) == (launcher.pids[0], 3)
    assert session == pid, "Ctrl-C must not reach a worker"
    launcher.tell(worker, line_of(Tell(stop=True)))
    assert note_of(next_events(launcher)[0]) == "told stop=True"
    launcher.end(worker)
    assert next_events(launcher) == [Ended(worker, True, "ended with exit code 0")]
    assert launcher.pids == () and not alive(int(pid))


@pytest.mark.parametrize(
    ("what", "words"),
    [("crash", ("ended with exit code 7", "about to fail", "printed by a library")), ("kill", ("killed by SIGKILL",))],
)
def test_a_death_is_named(launcher: ProcessLauncher, what: str, words: tuple[str, ...]) -> None:
    worker = launcher.launch(STUB, line_of(Say(what)), 1)
    [event] = next_events(launcher)
    assert isinstance(event, Ended) and (event.worker, event.asked) == (worker, False)
    assert all(word in event.words for word in words), event.words


def test_a_worker_that_is_killed_was_not_asked_and_its_processor_time_is_known(launcher: ProcessLauncher) -> None:
    worker = launcher.launch(STUB, line_of(Say("deaf")), 1)
    until(lambda: launcher.processor_s(worker) > 0)
    os.kill(launcher.pids[0], signal.SIGSTOP)
    time.sleep(0.05)
    used_s = launcher.processor_s(worker)
    time.sleep(0.2)
    assert launcher.processor_s(worker) == used_s, "it is stopped"
    launcher.kill(worker)
    assert next_events(launcher) == [Ended(worker, False, "killed by SIGKILL")]
    assert launcher.processor_s(worker) == 0.0


def test_a_worker_that_does_not_listen_is_killed(launcher: ProcessLauncher) -> None:
    worker = launcher.launch(STUB, line_of(Say("deaf")), 1)
    time.sleep(0.3)
    launcher.end(worker)
    launcher.tick(time.monotonic() + 100)
    assert next_events(launcher) == [Ended(worker, True, "killed by SIGKILL")]


def test_workers_die_with_a_supervisor_that_is_killed() -> None:
    program = (
        "import time; from agent.launcher import ProcessLauncher; from agent.workers.pipe import line_of\n"
        "from tests.agent.stub_worker import Say\n"
        f"one = ProcessLauncher(lambda: None); [one.launch({STUB!r}, line_of(Say(w)), 1) for w in ('talk', 'deaf')]\n"
        "time.sleep(0.5); print(*one.pids, flush=True); time.sleep(60)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    pids = [int(pid) for pid in supervisor.stdout.readline().split()]
    assert len(pids) == 2
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    until(lambda: not any(alive(pid) for pid in pids))


# The program.


def agent(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent", *arguments],
        capture_output=True, text=True, timeout=30, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--threads", "many"], ExitCode.USAGE, "--threads 'many'"),
        (["walk"], ExitCode.USAGE, "walk"),
        ([], ExitCode.USAGE, "COMMAND"),
        (["run", "--site-key-file", "/nonexistent"], ExitCode.USAGE, "/nonexistent"),
        (["bench", "--stored", "--state-dir", "/nonexistent"], ExitCode.USAGE, "no profile"),
        (["bench", "--sustained", "4"], ExitCode.USAGE, "--sustained 4 can't be measured"),
        (["bench", "--stored", "--sustained", "60"], ExitCode.USAGE, "with --stored"),
        (["run", "--state-dir", "/dev/null/x", "--broker", "127.0.0.1:1"], ExitCode.USAGE, "state folder"),
    ],
)
def test_a_users_mistake_is_two_lines_and_an_exit_code(arguments: list[str], code: int, words: str) -> None:
    done = agent(*arguments)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    assert 1 <= len(done.stderr.strip().splitlines()) <= 2 and done.stdout == ""


def test_info_and_version_need_no_broker(tmp_path: Path) -> None:
    assert agent("version").stdout.startswith("edgelam-agent ")
    done = agent("info", "--json", "--name", "pi5", EDGELAM_EMULATE_MEMORY="512MB", HOME=str(tmp_path))
    info = json.loads(done.stdout)
    assert info["device"] == "pi5" and info["memory_bytes"] <= 512 << 20 and "memory" in info["emulated"]


def test_the_command_line_imports_no_engine_and_is_quick_to_import() -> None:
    program = (
        "import sys, agent.cli, agent.service, agent.launcher, wire.mqtt, wire.discovery\n"
        "print(*(name for name in ('numpy', 'onnxruntime', 'torch', 'onnx', 'gguf', 'rich') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "" and done.returncode == 0, done


class Site:
    """A mosquitto of our own and a client that keeps what it sees."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._folder = folder
        self._broker: subprocess.Popen[bytes] | None = None
        self.seen: dict[str, list[bytes]] = {}
        self.start_broker()
        self.client = MqttTransport(self.url, "watcher", keepalive_s=10)
        self.client.subscribe(topics.everything("lab"), self._note, qos=1)
        self.client.start()

    def _note(self, inbound: Inbound) -> None:
        self.seen.setdefault(inbound.topic, []).append(inbound.payload)

    def start_broker(self) -> None:
        configuration = self._folder / "mosquitto.conf"
        user = "user root\n" if os.getuid() == 0 else ""
        configuration.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n{user}")
        assert MOSQUITTO is not None
        self._broker = subprocess.Popen(
            [MOSQUITTO, "-c", str(configuration)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def stop_broker(self) -> None:
        assert self._broker is not None
        self._broker.kill()
        self._broker.wait()

    def wait(self, condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "did not come to pass"
            self.client.poll(0.05)

    def state(self) -> DeviceState | None:
        found = self.seen.get(topics.STATE.on("lab", "pi5"))
        return decode(found[-1], DeviceState, "test") if found else None

    def is_state(self, text: str) -> bool:
        state = self.state()
        return state is not None and state.state == text

    def close(self) -> None:
        self.client.close()
        self.stop_broker()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def started(site: Site, folder: Path, host: str = "a", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "agent", "run", "--site", "lab", "--name", "pi5", "--broker", site.url,
            "--state-dir", str(folder / host / "state"), "--cache-dir", str(folder / host / "cache"),
            "--interfaces", "127.0.0.1",
        ],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


@needs_mosquitto
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_an_agent_that_is_told_to_end_says_offline_and_leaves(
    site: Site, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = started(site, tmp_path)
    site.wait(lambda: site.is_state("online"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=15)
    site.wait(lambda: site.is_state("offline"))
    assert process.returncode == code and "Traceback" not in errors
    state = site.state()
    assert state is not None and state.reason == "stopped"


@needs_mosquitto
def test_a_second_agent_of_one_name_leaves_with_exit_code_3_and_names_the_other(site: Site, tmp_path: Path) -> None:
    first = started(site, tmp_path)
    site.wait(lambda: site.is_state("online"))
    boot = site.state().boot  # type: ignore[union-attr]
    second = started(site, tmp_path, "b")
    _, errors = second.communicate(timeout=30)
    assert second.returncode == ExitCode.REFUSED and "already running" in errors and "--name" in errors
    site.wait(lambda: site.is_state("online"))
    assert site.state().boot == boot  # type: ignore[union-attr]
    first.terminate()
    first.communicate(timeout=15)


@needs_mosquitto
def test_an_idle_supervisor_is_small_and_quiet(site: Site, tmp_path: Path) -> None:
    process = started(site, tmp_path)
    heartbeats = topics.TELEMETRY.on("lab", "pi5")
    site.wait(lambda: len(site.seen.get(heartbeats, [])) >= 2)

    def processor_s() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def busy_fraction() -> float:
        before_s, before_busy_s = time.monotonic(), processor_s()
        site.wait(lambda: time.monotonic() - before_s > 4)
        return (processor_s() - before_busy_s) / (time.monotonic() - before_s)

    # A clock of 10 ms, and other tests beside it: an agent that is not idle is busy in every one of these.
    fraction = next((busy for busy in (busy_fraction() for _ in range(4)) if busy < 0.01), 1.0)
    beat = decode(site.seen[heartbeats][-1], Telemetry, "test")
    libraries = Path(f"/proc/{process.pid}/maps").read_text()
    process.terminate()
    process.communicate(timeout=15)
    print(f"an idle supervisor: {beat.memory_used_bytes / 1e6:.1f} MB, {fraction:.2%} of a core")
    assert beat.memory_used_bytes < 50 << 20
    assert fraction < 0.01
    assert not any(name in libraries for name in ("numpy", "onnxruntime", "torch"))


def test_an_agent_without_a_broker_goes_on_searching_and_tells_systemd_that_it_is_ready(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(15)
        process = subprocess.Popen(
            [sys.executable, "-m", "agent", "run", "--site", "nowhere-at-all", "--state-dir", str(tmp_path / "s"),
             "--cache-dir", str(tmp_path / "c"), "--interfaces", "127.0.0.1"],
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"},
        )  # fmt: skip
        heard = ""
        while "WATCHDOG=1" not in heard:
            heard += systemd.recv(4096).decode()
        assert "READY=1" in heard
        time.sleep(3.2)  # beyond the first search, so that its silence has been told
        assert process.poll() is None
        process.terminate()
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 0 and errors.count("of site 'nowhere-at-all'") == 1, errors


def test_a_watchdog_of_another_process_is_not_fed() -> None:
    assert Notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}).watchdog_period_s == 0.0
    assert not Notifier({}).say("READY=1")
