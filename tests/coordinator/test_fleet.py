"""Who is there: only a heartbeat is life, a boot speaks for itself alone, a restart is an update."""

from __future__ import annotations

from typing import Literal

import pytest

from coordinator.fleet import (
    AppliedArrived,
    Fleet,
    FleetEvent,
    InfoArrived,
    LinkDown,
    LinkUp,
    MdnsGone,
    MdnsSeen,
    Notice,
    Presence,
    ProfileArrived,
    StateArrived,
    TelemetryArrived,
    Tick,
)
from coordinator.notices import TABLE, notice
from coordinator.presence import NEXT, SAID, Signal
from tests.planning.boards import profile
from wire.limits import MAX_DEVICES, OFFLINE_AFTER_S, SUSPECT_AFTER_S
from wire.messages import Applied, DeviceInfo, DeviceState, Telemetry

A, B, C = "aaaa", "bbbb", "cccc"
Word = Literal["online", "busy", "draining", "offline"]


def state(boot: str, now_s: float, word: Word = "online", name: str = "pi5", reason: str = "") -> StateArrived:
    return StateArrived(name, DeviceState(state=word, boot=boot, since_unix=0.0, reason=reason), now_s)


def info(boot: str, now_s: float, name: str = "pi5", address: str = "10.0.0.7", claims: str = "") -> InfoArrived:
    told = DeviceInfo(
        device=claims or name, boot=boot, software="0.1.0", board="Raspberry Pi 5", arch="aarch64", os="Debian 13",
        python="3.11", cores=4.0, cores_because="no limit", memory_bytes=2**32, memory_because="total", engines=(),
        addresses=(address,),
    )  # fmt: skip
    return InfoArrived(name, told, now_s)


def beat(boot: str, now_s: float, name: str = "pi5") -> TelemetryArrived:
    told = Telemetry(seq=0, boot=boot, mono_s=now_s, cpu_fraction=0.0, memory_used_bytes=0, memory_bytes=1)
    return TelemetryArrived(name, told, now_s)


def applied(boot: str, now_s: float, epoch: int = 1) -> AppliedArrived:
    return AppliedArrived("pi5", Applied(device="pi5", boot=boot, epoch=epoch), now_s)


def after(*events: FleetEvent, fleet: Fleet | None = None) -> tuple[Fleet, list[Notice]]:
    fleet, notices = fleet or Fleet(), []
    for event in events:
        fleet, said = fleet.after(event)
        notices += said
    return fleet, notices


def codes(notices: list[Notice]) -> list[str]:
    return [said.code for said in notices]


def presence(fleet: Fleet, name: str = "pi5") -> Presence:
    return fleet.devices[name].presence


def online(boot: str = A, now_s: float = 0.0, name: str = "pi5") -> Fleet:
    fleet, _ = after(state(boot, now_s, name=name), info(boot, now_s, name), beat(boot, now_s, name))
    assert presence(fleet, name) is Presence.ONLINE
    return fleet


def test_a_device_joins_step_by_step() -> None:
    fleet, _ = after(MdnsSeen("pi5", A, "10.0.0.7", 0.0))
    assert presence(fleet) is Presence.SEEN
    fleet, _ = after(state(A, 1.0), info(A, 1.1), fleet=fleet)
    assert presence(fleet) is Presence.JOINING
    fleet, said = after(beat(A, 1.5), fleet=fleet)
    assert presence(fleet) is Presence.ONLINE
    assert [(n.code, n.text) for n in said] == [("device-online", "pi5 is online (10.0.0.7)")]


def test_retained_facts_alone_never_make_a_device_online() -> None:
    fleet, said = after(
        ProfileArrived("pi5", profile("pi5"), 0.0), info(A, 0.0), applied(A, 0.0), state(A, 0.0), Tick(1.0)
    )
    assert presence(fleet) is Presence.JOINING
    fleet, said = after(Tick(OFFLINE_AFTER_S), fleet=fleet)
    assert presence(fleet) is Presence.OFFLINE
    assert codes(said) == ["device-stale"]


def test_silence_makes_suspect_then_offline_and_a_heartbeat_brings_it_back() -> None:
    fleet, said = after(Tick(SUSPECT_AFTER_S), fleet=online())
    assert (presence(fleet), codes(said)) == (Presence.SUSPECT, ["device-suspect"])
    fleet, said = after(beat(A, SUSPECT_AFTER_S + 0.1), fleet=fleet)
    assert (presence(fleet), codes(said)) == (Presence.ONLINE, ["device-back"])
    fleet, said = after(Tick(20.0), Tick(30.0), fleet=fleet)
    assert (presence(fleet), codes(said)) == (Presence.OFFLINE, ["device-silent"])
    assert "10.0.0.7" in said[0].try_
    fleet, said = after(beat(A, 31.0), fleet=fleet)
    assert (presence(fleet), codes(said)) == (Presence.ONLINE, ["device-online"])


def test_a_device_that_leaves_in_order_says_why() -> None:
    fleet, said = after(state(A, 1.0, "offline", reason="stopped by SIGTERM"), fleet=online())
    assert presence(fleet) is Presence.OFFLINE
    assert [n.text for n in said] == ["pi5 left: stopped by SIGTERM"]


def test_a_heartbeat_that_was_under_way_does_not_bring_back_who_left() -> None:
    fleet, _ = after(state(A, 1.0, "offline"), beat(A, 1.1), fleet=online())
    assert presence(fleet) is Presence.OFFLINE


def test_a_busy_device_is_online() -> None:
    fleet, _ = after(state(A, 1.0, "busy"), fleet=online())
    assert presence(fleet) is Presence.ONLINE


def test_the_last_will_of_an_earlier_boot_does_not_end_the_new_one() -> None:
    fleet, _ = after(state(B, 1.0), info(B, 1.0), beat(B, 1.2), state(A, 3.0, "offline"), fleet=online(A))
    assert presence(fleet) is Presence.ONLINE
    assert fleet.devices["pi5"].boot == B
    assert fleet.ignored["last will of an earlier boot"] == 1


def test_a_late_last_will_in_what_is_retained_does_not_hide_a_living_boot() -> None:
    fleet, _ = after(state(A, 0.0, "offline"), info(B, 0.0), beat(B, 0.5), beat(B, 1.5), beat(B, 2.5), beat(B, 3.5))
    assert presence(fleet) is Presence.ONLINE
    assert fleet.devices["pi5"].boot == B


def test_a_restart_is_an_update_and_not_a_second_device() -> None:
    fleet, said = after(state(B, 1.0), fleet=online(A))
    assert list(fleet.devices) == ["pi5"]
    assert (presence(fleet), codes(said)) == (Presence.JOINING, ["device-restarted"])
    assert fleet.devices["pi5"].applied is None, "what the old boot ran is not what the new one runs"
    fleet, said = after(info(B, 1.1), beat(B, 2.0), fleet=fleet)
    assert (presence(fleet), codes(said)) == (Presence.ONLINE, ["device-online"])


def test_what_a_new_boot_applied_is_kept_even_if_it_comes_before_its_state() -> None:
    fleet, _ = after(applied(B, 0.9, epoch=7), state(B, 1.0), fleet=online(A))
    kept = fleet.devices["pi5"].applied
    assert kept is not None and kept.epoch == 7


def test_facts_of_a_replaced_boot_are_not_taken() -> None:
    fleet, _ = after(state(B, 1.0), info(B, 1.0), beat(B, 1.5), fleet=online(A))
    fleet, _ = after(applied(B, 2.0, 5), applied(A, 2.1, 4), info(A, 2.1, address="10.0.0.99"), fleet=fleet)
    device = fleet.devices["pi5"]
    assert device.applied is not None and device.applied.epoch == 5
    assert device.info is not None and device.info.boot == B
    assert fleet.ignored == {"applied of a replaced boot": 1, "info of a replaced boot": 1}


def test_a_late_heartbeat_of_the_old_boot_is_no_second_agent() -> None:
    fleet, said = after(
        state(B, 1.0), beat(A, 1.05), info(B, 1.1), beat(B, 2.0), beat(A, 2.01), beat(B, 3.0), fleet=online(A)
    )
    assert presence(fleet) is Presence.ONLINE
    assert "identity-twice" not in codes(said)


def test_two_boots_heartbeating_at_once_are_named_with_both_hosts_once() -> None:
    fleet, _ = after(state(B, 1.0), info(B, 1.0, address="10.0.0.8"), fleet=online(A))
    said: list[Notice] = []
    for second in range(2, 12):
        fleet, more = after(beat(B, second), beat(A, second + 0.5), fleet=fleet)
        said += more
    twice = [n for n in said if n.code == "identity-twice"]
    assert [n.text for n in twice] == ["two agents use the name pi5: 10.0.0.8 and 10.0.0.7"]
    assert twice[0].level == "error" and "--name" in twice[0].try_
    assert fleet.devices["pi5"].boot == B, "the later one keeps the name"


def test_the_surviving_agent_of_two_is_taken_back() -> None:
    fleet, _ = after(state(B, 1.0), info(B, 1.0), beat(B, 2.0), fleet=online(A))
    fleet, _ = after(Tick(20.0), state(A, 21.0), info(A, 21.0), beat(A, 21.5), fleet=fleet)
    assert presence(fleet) is Presence.ONLINE
    assert fleet.devices["pi5"].boot == A


def test_mdns_never_keeps_a_device_alive_and_never_ends_it() -> None:
    fleet, _ = after(MdnsGone("pi5", 0.5), fleet=online())
    assert presence(fleet) is Presence.ONLINE
    fleet, _ = after(MdnsSeen("pi5", A, "10.0.0.7", 1.0), Tick(60.0), MdnsSeen("pi5", A, "10.0.0.7", 61.0), fleet=fleet)
    assert presence(fleet) is Presence.OFFLINE


def test_a_device_only_seen_is_forgotten_when_its_advertisement_ends() -> None:
    fleet, said = after(MdnsSeen("pi5", A, "10.0.0.7", 0.0), MdnsGone("pi5", 5.0), MdnsGone("ghost", 5.0))
    assert not fleet.devices and not said


def test_a_device_seen_but_never_on_the_broker_is_said_once_with_what_to_try() -> None:
    fleet, said = after(MdnsSeen("pi5", A, "10.0.0.7", 0.0), Tick(9.0))
    assert not said
    fleet, said = after(Tick(10.5), Tick(11.0), Tick(60.0), fleet=fleet)
    assert codes(said) == ["device-not-joining"]
    assert "visible over mDNS at 10.0.0.7" in said[0].text and "broker's port" in said[0].try_


def test_silence_means_nothing_while_our_own_connection_is_down() -> None:
    fleet, said = after(LinkDown(1.0), Tick(30.0), LinkUp(31.0), Tick(32.0), fleet=online())
    assert presence(fleet) is Presence.ONLINE and not said
    fleet, _ = after(Tick(31.0 + OFFLINE_AFTER_S), fleet=fleet)
    assert presence(fleet) is Presence.OFFLINE


def test_names_that_are_none_and_claims_of_other_names_are_counted_and_dropped() -> None:
    fleet, _ = after(beat(A, 0.0, "Not A Name"), info(A, 0.0, claims="other"), fleet=online())
    assert list(fleet.devices) == ["pi5"]
    assert fleet.ignored == {"illegal device name": 1, "info of another name": 1}
    kept = fleet.devices["pi5"].info
    assert kept is not None and kept.device == "pi5"


def test_a_full_fleet_forgets_the_absent_first_and_then_admits_nobody() -> None:
    fleet, _ = after(*(MdnsSeen(f"ghost-{n}", A, "h", float(n)) for n in range(MAX_DEVICES + 10)))
    assert len(fleet.devices) == MAX_DEVICES and "ghost-0" not in fleet.devices
    fleet, _ = after(*(beat(A, 300.0, f"d-{n}") for n in range(MAX_DEVICES)), fleet=fleet)
    assert not any(name.startswith("ghost") for name in fleet.devices)
    fleet, said = after(beat(A, 300.0, "late"), beat(A, 300.0, "later"), fleet=fleet)
    assert "late" not in fleet.devices and len(fleet.devices) == MAX_DEVICES
    assert codes(said) == ["fleet-full"]
    assert fleet.ignored["fleet full"] == 2


def test_after_does_not_change_the_fleet_before() -> None:
    before = online()
    kept = dict(before.devices)
    after(state(B, 1.0), beat(B, 1.5), MdnsGone("pi5", 2.0), Tick(90.0), fleet=before)
    assert before.devices == kept


IMPOSSIBLE = {
    (Presence.SEEN, Signal.READY): "life is first heard as BEAT",
    (Presence.SEEN, Signal.RESTARTED): "no boot was heard yet",
    (Presence.SEEN, Signal.QUIET): "silence of what never spoke is no news",
    (Presence.SEEN, Signal.SILENT): "silence of what never spoke is no news",
    (Presence.OFFLINE, Signal.QUIET): "silence is expected",
    (Presence.OFFLINE, Signal.SILENT): "silence is expected",
}


@pytest.mark.parametrize("there", list(Presence))
@pytest.mark.parametrize("signal", list(Signal))
def test_every_step_is_in_the_table_or_known_to_be_impossible(there: Presence, signal: Signal) -> None:
    assert ((there, signal) in NEXT) != ((there, signal) in IMPOSSIBLE)


def test_every_notice_of_the_fleet_is_a_row_and_every_row_can_be_filled() -> None:
    assert set(SAID.values()) <= set(TABLE)
    assert set(SAID) <= set(NEXT)
    fields = {
        "host": "h", "other_host": "i", "silent_s": 1.0, "waited_s": 1.0, "reason": "r", "old": "o", "new": "n",
        "limit": 1, "url": "u", "what": "w", "more_ms": 1.0, "engine": "o",
        "heat": "", "name": "tiny", "boards": "a, b", "epoch": 3, "because": "b",
    }  # fmt: skip
    for code, row in TABLE.items():
        said = notice(code, device="pi5", **fields)
        assert "{" not in said.text + said.try_
        assert row.level == "info" or said.try_, f"{code} leaves the user alone"
