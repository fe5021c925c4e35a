"""The pure parts: settings, claims to a name, convergence, restarts, orders, names of deaths."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from agent import converge
from agent.answers import AppliedNews
from agent.claim import ECHO_TIMEOUT_S, LISTEN_S, Claim, Verdict
from agent.config import SETTINGS, AgentConfig, HostPort, Via, broker_url, host_port, legal_name, load, size_bytes, via
from agent.converge import Adopt, Fetch, Hold, Running, Start, Stop, actions
from agent.describe import device_info
from agent.fetch import artifact_url
from agent.finder import whereabouts
from agent.hanging import HANGING_AFTER_S, LEAST_PROCESSOR_S, LOADING_HANGS_AFTER_S, MUTE_AFTER_S, Sign
from agent.restarts import Deaths
from agent.telemetry import Pulse
from agent.workers.clock import Clocks
from agent.workers.deaths import oom_kills, words_for
from agent.workers.stretch import MAX_KINDS, Stretch
from agent.workers.throttle import LEAST_SHARE, Throttle
from hwprofiles.profile import Interface
from hwprofiles.reading import Absent
from hwprofiles.survey import survey
from tests.agent.fakes import order_of
from wire.advertisement import Found
from wire.errors import UsageError
from wire.ids import is_name
from wire.messages import Applied, DeviceState, StageReport

# Settings.


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "agent.json"
    file.write_text('{"name": "from-file", "site": "from-file", "threads": 3}')
    environment = {"HOME": str(tmp_path), "EDGELAM_CONFIG": str(file), "EDGELAM_NAME": "from-env"}
    config = load({"name": None, "site": "from-flag"}, environment)
    assert (config.site, config.name, config.threads, config.emulate_speed) == ("from-flag", "from-env", 3, 1.0)
    assert config.state_dir == tmp_path / ".local/state/edgelam/agent"


def test_a_budget_belongs_to_data_that_are_there() -> None:
    found = load({"data": "notes=/srv/n.jsonl,mail=/srv/m", "data-epsilon": "mail=2.5"}, {"HOME": "/nonexistent"})
    assert found.data_epsilon == (("mail", 2.5),) and [name for name, _ in found.data] == ["notes", "mail"]


def test_states_leave_a_board_that_has_a_budget_only_where_its_owner_says_so() -> None:
    flags = {"data": "notes=/srv/n.jsonl,mail=/srv/m", "data-epsilon": "mail=2.5,notes=1"}
    assert load(flags, {"HOME": "/nonexistent"}).data_states == ()
    assert load({**flags, "data-states": "notes, mail"}, {"HOME": "/nonexistent"}).data_states == ("notes", "mail")
    with pytest.raises(UsageError, match="of data without a bound"):
        load({**flags, "data-epsilon": "notes=1", "data-states": "mail"}, {"HOME": "/nonexistent"})


def test_every_setting_has_a_variable_and_a_field() -> None:
    fields = load({}, {"HOME": "/nonexistent"}).__struct_fields__
    assert {setting.field for setting in SETTINGS} == set(fields)
    assert [setting.variable for setting in SETTINGS if setting.flag == "state-dir"] == ["EDGELAM_STATE_DIR"]


def test_systemd_and_the_user_say_where_state_and_cache_are(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert load({}, {**home, "STATE_DIRECTORY": "/var/lib/edgelam"}).state_dir == Path("/var/lib/edgelam")
    assert load({}, {**home, "EDGELAM_CACHE": "/c", "EDGELAM_STATE": "/s"}).cache_dir == Path("/c")


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("name", "Pi5"), ("site", "a.b"), ("broker", "http://x"), ("broker", "mqtt://x:99999"), ("cache-limit", "much"),
        ("via", "ftp=x:1"), ("via", "mqtt=x"), ("emulate-speed", "0"), ("emulate-speed", "1.5"), ("threads", "-1"),
        ("threads", "x"), ("config", "/dev/null"), ("site-key-file", "/dev/null"), ("site-key-file", "/usr/bin/env"),
        ("site-key-file", "/nonexistent"), ("log-level", "loud"), ("config", "/nonexistent"),
        ("data", "notes"), ("data", "a=/x,a=/y"), ("data-epsilon", "notes"), ("data-epsilon", "notes=0"),
        ("data-epsilon", "notes=much"), ("data-epsilon", "notes=1,notes=2"), ("data-epsilon", "notes=3"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_the_users_mistake_and_named(flag: str, text: str) -> None:
    with pytest.raises(UsageError) as refused:
        load({flag: text}, {"HOME": "/nonexistent"})
    assert refused.value.try_, "a mistake comes with a remedy"
    assert "Errno" not in refused.value.message and "codec" not in refused.value.message


def test_sizes_and_addresses_are_read_as_people_write_them() -> None:
    assert [size_bytes(text) for text in ("512MB", "1.5G", "20 GiB", "7")] == [512 << 20, 3 << 29, 20 << 30, 7]
    assert host_port("[::1]:5") == HostPort("::1", 5) and str(HostPort("::1", 5)) == "[::1]:5"
    assert broker_url("10.0.0.5") == "mqtt://10.0.0.5:8570" and broker_url("mqtt://h:1/") == "mqtt://h:1"
    assert via("mqtt=a:1,http=b:2") == Via(HostPort("a", 1), HostPort("b", 2))


@given(st.text(max_size=80))
def test_any_host_name_becomes_a_legal_device_name(hostname: str) -> None:
    assert is_name(legal_name(hostname))


# Claims.


def state(boot: str, since: float = 1.0, what: str = "online") -> DeviceState:
    return DeviceState(state=what, boot=boot, since_unix=since)  # type: ignore[arg-type]


def test_a_name_nobody_uses_is_ours_at_the_echo() -> None:
    claim = Claim("us", 5.0, 0.0)
    assert claim.verdict(0.1) is Verdict.WAIT
    claim.heartbeat_seen("us", 0.1)
    assert claim.verdict(0.1) is Verdict.FREE


def test_without_an_echo_the_name_is_ours_after_a_while() -> None:
    assert Claim("us", 5.0, 0.0).verdict(ECHO_TIMEOUT_S) is Verdict.FREE


def test_an_online_state_whose_boot_is_heard_is_anothers() -> None:
    claim = Claim("us", 5.0, 0.0)
    claim.state_seen(state("them"), 0.1)
    claim.heartbeat_seen("us", 0.1)
    assert claim.verdict(1.0) is Verdict.WAIT
    claim.heartbeat_seen("them", 1.1)
    assert claim.verdict(1.1) is Verdict.TAKEN and claim.rival == "them"


def test_an_online_state_whose_boot_is_silent_is_taken_over() -> None:
    claim = Claim("us", 5.0, 0.0)
    claim.state_seen(state("them"), 0.1)
    assert claim.verdict(LISTEN_S) is Verdict.WAIT
    assert claim.verdict(0.1 + LISTEN_S) is Verdict.FREE


@pytest.mark.parametrize(("ours", "theirs", "stays"), [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_of_two_that_claimed_at_once_the_earlier_stays(ours: float, theirs: float, stays: bool) -> None:
    claim = Claim("us", ours, 0.0)
    claim.heartbeat_seen("us", 0.0)
    assert claim.verdict(0.0) is Verdict.FREE
    claim.state_seen(state("them", theirs), 1.0)
    claim.heartbeat_seen("them", 1.0)
    assert (claim.verdict(1.0) is Verdict.WAIT) is stays


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.text("0123456789abcdef", min_size=1, max_size=4))
def test_of_two_agents_exactly_one_gives_way(since_a: float, since_b: float, boot: str) -> None:
    a, b = Claim(boot, since_a, 0.0), Claim(boot + "0", since_b, 0.0)
    for claim, other, since in ((a, boot + "0", since_b), (b, boot, since_a)):
        claim.verdict(ECHO_TIMEOUT_S)
        claim.state_seen(state(other, since), 3.0)
        claim.heartbeat_seen(other, 3.0)
    assert {a.verdict(3.0), b.verdict(3.0)} == {Verdict.WAIT, Verdict.TAKEN}


def test_a_last_will_alone_never_drives_a_living_agent_away() -> None:
    claim = Claim("us", 5.0, 0.0)
    claim.heartbeat_seen("us", 0.0)
    claim.verdict(0.0)
    claim.state_seen(state("them", 1.0, "offline"), 1.0)
    claim.heartbeat_seen("them", 1.0)
    assert claim.verdict(9.0) is Verdict.WAIT


# Convergence.

GRAPH, WEIGHTS = order_of().graph.digest, order_of().weights[0].digest
ALL = {GRAPH, WEIGHTS}


@pytest.mark.parametrize(
    ("wanted", "running", "present", "expected"),
    [
        ([], Running(order_of()), ALL, [Stop]),
        ([order_of(epoch=2, slots=9)], Running(order_of()), ALL, [Stop]),
        ([order_of(epoch=2)], Running(order_of()), ALL, [Adopt]),
        ([order_of()], Running(order_of()), set(), []),
        ([order_of(slots=9)], Running(order_of(), ending=True), ALL, []),
        ([order_of()], None, {GRAPH}, [Fetch]),
        ([order_of()], Running(None, hold=Hold.RESTING), ALL, []),
        ([order_of()], Running(None, hold=Hold.GIVEN_UP), ALL, []),
        ([order_of()], None, ALL, [Start]),
        ([], Running(None), ALL, []),
        ([order_of(epoch=2)], Running(order_of(standby=True)), ALL, [Adopt]),
        ([order_of(standby=True)], Running(order_of()), ALL, [Adopt]),
        ([order_of(standby=True)], None, ALL, [Start]),
        ([order_of(standby=True)], None, set(), [Fetch]),
    ],
)
def test_each_situation_has_its_action(wanted, running, present, expected) -> None:  # type: ignore[no-untyped-def]
    now = {} if running is None else {("chat", 0): running}
    assert [type(action) for action in actions(wanted, now, present)] == expected


def test_a_copy_waits_until_the_stages_that_answer_were_started() -> None:
    active, copy = order_of(0, 2), order_of(1, 2, standby=True)
    assert [type(action) for action in actions([active, copy], {}, set())] == [Fetch]
    [started] = actions([active, copy], {}, ALL)
    assert isinstance(started, Start) and started.order == active
    assert actions([active, copy], {("chat", 0): Running(active)}, ALL) == (Start(("chat", 1), copy),)
    given_up = {("chat", 0): Running(None, hold=Hold.GIVEN_UP)}
    assert actions([active, copy], given_up, ALL) == (Start(("chat", 1), copy),), "there is nothing to wait for"
    other = {("chat", 1): Running(order_of(1, 2, slots=9))}
    assert [type(action) for action in actions([active, copy], other, ALL)] == [Stop, Start], "memory comes back first"


ORDERS = st.builds(
    lambda stage, epoch, slots, standby: order_of(stage, 4, epoch, slots=slots, standby=standby),
    st.integers(0, 3), st.integers(1, 3), st.integers(1, 2), st.booleans(),
)  # fmt: skip


@settings(max_examples=100)
@given(
    st.lists(ORDERS, max_size=4, unique_by=lambda o: o.stage), st.lists(ORDERS, max_size=4, unique_by=lambda o: o.stage)
)
def test_whatever_runs_what_is_wanted_comes_to_run(before: list, wanted: list) -> None:  # type: ignore[type-arg]
    running = {converge.key_of(order): Running(order) for order in before}
    present: set[str] = set()
    for _ in range(8):
        given_actions = actions(wanted, running, present)
        if not given_actions:
            break
        for action in given_actions:
            if isinstance(action, Stop):
                del running[action.key]
            elif isinstance(action, Fetch):
                present |= {ref.digest for ref in action.refs}
            else:
                running[action.key] = Running(action.order)
    assert {key: now.order for key, now in running.items()} == {converge.key_of(o): o for o in wanted}


def test_stops_come_before_anything_else() -> None:
    found = actions([order_of(0, 2)], {("chat", 1): Running(order_of(1, 2))}, ALL)
    assert [type(action) for action in found] == [Stop, Start]


def test_a_new_phase_is_told_at_once_and_progress_at_most_twice_a_second() -> None:
    news, told = AppliedNews(), []
    for tenth in range(31):
        phase = "fetching" if tenth < 30 else "loading"
        report = StageReport(
            deployment="chat", epoch=1, stage=0, phase=phase, fetched_bytes=tenth, resident_bytes=tenth
        )
        if news.news(Applied(device="pi5", boot="ab", epoch=1, stages=(report,)), tenth / 10):
            told.append(tenth)
    assert told == [0, 5, 10, 15, 20, 25, 30]


# Restarts and deaths.


def test_a_first_death_costs_no_pause_then_they_double_and_the_fifth_death_in_five_minutes_is_the_last() -> None:
    deaths, at_s, pauses = Deaths(), 100.0, []
    for _ in range(4):
        deaths.died(at_s)
        pauses.append(deaths.until_s - at_s)
        assert not deaths.gave_up
        at_s = deaths.until_s
    deaths.died(at_s)
    assert pauses == [0, 1, 2, 4] and deaths.gave_up and deaths.total == 5


def test_deaths_long_ago_are_forgiven() -> None:
    deaths = Deaths()
    for day in range(20):
        deaths.died(day * 400.0)
    assert not deaths.gave_up and deaths.until_s == 19 * 400.0


# Hanging.


def test_a_worker_without_a_word_and_without_processor_time_hangs() -> None:
    sign = Sign(100.0)
    sign.used(1.0, 101.0)
    sign.used(1.0 + LEAST_PROCESSOR_S / 2, 104.0)
    assert not sign.problem(101.0 + HANGING_AFTER_S)
    assert "no processor time" in sign.problem(101.1 + HANGING_AFTER_S)


def test_a_worker_in_a_long_step_does_not_hang_until_no_step_takes_so_long() -> None:
    sign = Sign(100.0)
    for second in range(1, int(MUTE_AFTER_S) + 1):
        sign.used(0.2 * second, 100.0 + second)
        assert not sign.problem(100.0 + second)
    assert "no word" in sign.problem(101.0 + MUTE_AFTER_S)


def test_a_worker_that_reports_does_not_hang_however_little_it_does() -> None:
    sign = Sign(100.0)
    for second in range(1, 1000):
        sign.heard(100.0 + second)
        assert not sign.problem(100.5 + second)


def test_a_worker_that_loads_may_build_for_an_hour_but_not_wait_for_nothing() -> None:
    sign = Sign(100.0, loading=True)
    for minute in range(1, 61):
        sign.used(10.0 * minute, 100.0 + 60.0 * minute)
        assert not sign.problem(100.0 + 60.0 * minute)
    last_s = 100.0 + 60.0 * 60
    assert not sign.problem(last_s + LOADING_HANGS_AFTER_S)
    assert "no processor time for 120 s" in sign.problem(last_s + LOADING_HANGS_AFTER_S + 0.1)


def test_an_emulated_slow_board_sleeps_in_its_steps() -> None:
    assert not Sign(100.0, speed=0.25).problem(100.0 + 4 * HANGING_AFTER_S)
    assert Sign(100.0, speed=0.25).problem(100.1 + 4 * HANGING_AFTER_S)
    assert Sign(100.0, speed=2.0).problem(100.1 + HANGING_AFTER_S)


def test_deaths_are_named_by_signal_code_and_memory(tmp_path: Path) -> None:
    assert words_for(-9, [], 3, 4) == "killed by the kernel: out of memory"
    assert words_for(-9, [], 3, 3) == "killed by SIGKILL" and words_for(-9, [], None, 3) == "killed by SIGKILL"
    assert words_for(-11, ["boom"], 0, 1) == "killed by SIGSEGV; it said: boom"
    assert words_for(1, ["a", "b", "c", "d"], 0, 0) == "ended with exit code 1; it said: b | c | d"
    assert oom_kills(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("nr_free 5\noom_kill 7\n")
    assert oom_kills(tmp_path) == 7


# Stretching, heartbeat, addresses.


def test_an_agent_that_was_given_addresses_announces_no_others(tmp_path: Path) -> None:
    host = survey(Path("/"), "pi5")
    outer = Interface(name="eth0", addresses=("10.0.0.5",), wireless=False, link_bits_per_s=Absent("unknown"))
    host = host._replace(identity=structs.replace(host.identity, interfaces=(outer,)))
    free = AgentConfig(name="pi5", state_dir=tmp_path, cache_dir=tmp_path)
    bound = structs.replace(free, interfaces=("127.0.0.1",))
    assert device_info(host, free, "ab").addresses == ("10.0.0.5",)
    assert device_info(host, bound, "ab").addresses == ("127.0.0.1",)


class Time:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.wall_s = self.busy_s = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.wall_s += seconds + 0.0001  # as sleeps are: a little late

    def step(self, stretch: Stretch, busy_s: float, waited_s: float = 0.0, kind: str = "", context: int = 0) -> float:
        stretch.begin()
        self.busy_s += busy_s
        self.wall_s += busy_s + waited_s
        return stretch.end(kind, 1, context)


def stretched(speed: float, threads: int = 1) -> tuple[Time, Stretch]:
    now = Time()
    return now, Stretch(speed, threads, Clocks(lambda: now.wall_s, lambda: now.busy_s), now.sleep)


def test_a_quarter_of_the_speed_takes_four_times_as_long_also_over_many_steps() -> None:
    now, stretch = stretched(0.25)
    total_s = sum(now.step(stretch, 0.001) for _ in range(1000))
    assert total_s == pytest.approx(4.0, rel=0.001)


def test_a_throttled_board_takes_longer_from_the_next_step_on_and_can_be_as_fast_again() -> None:
    now, stretch = stretched(0.5)
    assert now.step(stretch, 0.010) == pytest.approx(0.020, abs=0.0002)
    stretch.throttle(0.25)
    assert now.step(stretch, 0.010) == pytest.approx(0.080, abs=0.0002)
    stretch.throttle(1.0)
    assert now.step(stretch, 0.010) == pytest.approx(0.020, abs=0.0002)
    now, stretch = stretched(1.0)
    stretch.throttle(0.5)
    assert now.step(stretch, 0.010) == pytest.approx(0.020, abs=0.0002)
    stretch.throttle(1.0)
    assert now.step(stretch, 0.010) == pytest.approx(0.010, abs=0.0002)


@pytest.mark.parametrize(
    ("text", "share"),
    [("0.3\n", 0.3), ("1", 1.0), ("7", 1.0), ("0.001", LEAST_SHARE), ("", 1.0), ("hot", 1.0), ("-1", 1.0),
     ("nan", 1.0), ("inf", 1.0), ("0" * 10_000_000, 1.0), ("\xff", 1.0)],
)  # fmt: skip
def test_a_throttle_is_a_share_whatever_the_file_holds(text: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / "throttle"
    assert Throttle("").share() == Throttle(str(path)).share() == 1.0
    path.write_bytes(text.encode("latin-1"))
    assert Throttle(str(path)).share() == share


def test_steps_that_neighbours_disturb_are_not_stretched_for_it() -> None:
    now, stretch = stretched(0.25)
    took = [now.step(stretch, busy, kind="chunk") for busy in (0.010, 0.013, 0.010, 0.014, 0.013, 0.012)]
    assert took == pytest.approx([0.040] * 6, abs=0.0002)
    # What it computed it did compute, and without a kind nothing is known.
    assert now.step(stretch, 0.060, kind="chunk") == pytest.approx(0.120, abs=0.0002)
    assert now.step(stretch, 0.014) == pytest.approx(0.056, abs=0.0002)
    assert now.step(stretch, 0.014, kind="last") == pytest.approx(0.056, abs=0.0002)
    assert now.step(stretch, 0.014, kind="chunk", context=64) == pytest.approx(0.056, abs=0.0002)


def test_a_processor_that_really_gets_slower_is_believed_soon() -> None:
    now, stretch = stretched(0.5)
    for _ in range(100):
        now.step(stretch, 0.010, kind="chunk")
    took = [now.step(stretch, 0.015, kind="chunk") for _ in range(80)]
    assert took[0] == pytest.approx(0.020, abs=0.0003)
    assert took[64:] == pytest.approx([0.030] * 16, abs=0.0003)


def test_kinds_of_steps_that_are_remembered_are_few() -> None:
    now, stretch = stretched(0.5)
    for number in range(3000):
        now.step(stretch, 0.001, kind="chunk", context=64 * number)
    assert len(stretch._undisturbed._lately) <= MAX_KINDS


def test_full_speed_never_sleeps() -> None:
    now, stretch = stretched(1.0)
    assert now.step(stretch, 0.5) == 0.5 and now.slept == []


def test_waiting_for_a_core_is_not_stretched() -> None:
    now, stretch = stretched(0.5)
    assert now.step(stretch, 0.010, waited_s=0.005) == pytest.approx(0.020, abs=0.0002)
    assert now.step(stretch, 0.010, waited_s=0.050) == pytest.approx(0.060, abs=0.0002)


def test_with_many_threads_wall_time_is_stretched() -> None:
    now, stretch = stretched(0.5, threads=4)
    assert now.step(stretch, 0.0, waited_s=0.010) == pytest.approx(0.020, abs=0.0002)


def test_a_heartbeat_counts_processor_time_and_memory_of_all_processes(tmp_path: Path) -> None:
    folder = tmp_path / "proc/7"
    folder.mkdir(parents=True)
    (folder / "statm").write_text("100 25 1 1 0 1 0")
    pulse = Pulse("b", 1000, tmp_path)
    for ticks in (100, 150):
        (folder / "stat").write_text(f"7 (a ) b) S {' '.join(['0'] * 10)} {ticks} 0 0 0")
        beat = pulse.beat(ticks / 50, (7, 99999), None, ())
    assert beat.cpu_fraction == pytest.approx(0.5) and beat.memory_used_bytes == 25 * 4096 and beat.seq == 2


def test_artifacts_are_fetched_from_where_the_device_can_reach_them() -> None:
    assert artifact_url("http://c:8571", "sha256:aa", None, "b") == "http://c:8571/v1/artifacts/sha256:aa"
    assert artifact_url("http://0.0.0.0:8571/", "d", None, "fe80::1") == "http://[fe80::1]:8571/v1/artifacts/d"
    assert artifact_url("https://c/x", "d", HostPort("t", 9), "b") == "https://t:9/x/v1/artifacts/d"
    with pytest.raises(ValueError, match="only http"):
        artifact_url("file:///etc", "d", None, "b")


def test_a_tunnel_is_dialled_instead_of_what_was_found() -> None:
    found = Found(
        role="coordinator", site="lab", name="coordinator", boot="ab", addresses=("10.0.0.1", "fe80::1%eth0"),
        port=8570, protocol=1, properties={},
    )  # fmt: skip
    assert whereabouts(found, None).urls == ("mqtt://10.0.0.1:8570", "mqtt://[fe80::1%eth0]:8570")
    assert whereabouts(found, HostPort("127.0.0.1", 7)).urls == ("mqtt://127.0.0.1:7",)
