"""Whatever arrives in whatever order, the fleet keeps its promises."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordinator.fleet import Fleet, FleetEvent, LinkDown, LinkUp, MdnsGone, MdnsSeen, Presence, Tick, Unanswered
from tests.coordinator.test_fleet import applied, beat, info, state
from wire.limits import OFFLINE_AFTER_S, SUSPECT_AFTER_S

NAMES = st.sampled_from(["pi5", "orin"])
BOOTS = st.sampled_from(["aaaa", "bbbb", "cccc"])
ALIVE = (Presence.ONLINE, Presence.SUSPECT)


class AnyOrder(RuleBasedStateMachine):
    """Random messages of three boots under two names, time that passes, links that break."""

    @initialize()
    def begin(self) -> None:
        self.fleet = Fleet()
        self.now_s = 100.0
        self.beats: dict[tuple[str, str], float] = {}
        self.listening_since_s: float | None = 0.0

    def feed(self, event: FleetEvent) -> None:
        self.fleet, notices = self.fleet.after(event)
        for notice in notices:
            assert notice.text and "None" not in notice.text

    def presences(self) -> dict[str, Presence]:
        return {name: device.presence for name, device in self.fleet.devices.items()}

    @rule(passed_s=st.sampled_from([0.01, 0.4, 1.0, 3.0, 7.0]))
    def time_passes(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.feed(Tick(self.now_s))
        for name, device in self.fleet.devices.items():
            if device.presence is Presence.ONLINE and self.listening_since_s is not None:
                heard_s = max(self.beats.get((name, device.boot), 0.0), self.listening_since_s)
                assert self.now_s - heard_s < SUSPECT_AFTER_S
            if device.presence is Presence.SUSPECT and self.listening_since_s is not None:
                heard_s = max(self.beats.get((name, device.boot), 0.0), self.listening_since_s)
                assert self.now_s - heard_s < OFFLINE_AFTER_S

    @rule(name=NAMES, boot=BOOTS)
    def heartbeat(self, name: str, boot: str) -> None:
        self.beats[name, boot] = self.now_s
        self.feed(beat(boot, self.now_s, name))

    @rule(name=NAMES, boot=BOOTS, word=st.sampled_from(["online", "busy", "draining", "offline"]))
    def says(self, name: str, boot: str, word: str) -> None:
        before = self.fleet.devices.get(name)
        self.feed(state(boot, self.now_s, word, name))  # type: ignore[arg-type]
        now = self.fleet.devices.get(name)
        if before is not None and now is not None and word == "offline" and before.boot not in ("", boot):
            assert now.presence is before.presence, "another boot's last will changed something"

    @rule(name=NAMES, boot=BOOTS)
    def tells(self, name: str, boot: str) -> None:
        before = self.presences().get(name)
        self.feed(info(boot, self.now_s, name))
        if before is Presence.OFFLINE:
            fresh = self.beats.get((name, self.fleet.devices[name].boot), 0.0) > self.now_s - SUSPECT_AFTER_S
            assert fresh or self.presences()[name] is Presence.OFFLINE, "a retained fact brought back the dead"

    @rule(boot=BOOTS)
    def applies(self, boot: str) -> None:
        self.feed(applied(boot, self.now_s))

    @rule(name=NAMES, boot=BOOTS, seen=st.booleans())
    def mdns(self, name: str, boot: str, seen: bool) -> None:
        before = self.presences()
        self.feed(MdnsSeen(name, boot, "10.0.0.9", self.now_s) if seen else MdnsGone(name, self.now_s))
        for known, was in before.items():
            assert was is Presence.SEEN or self.presences()[known] is was, "mDNS decided over life"

    @rule(name=NAMES)
    def a_stage_does_not_answer(self, name: str) -> None:
        before = self.presences()
        self.feed(Unanswered(name, self.now_s))
        assert self.presences().keys() == before.keys()
        assert self.presences().get(name) not in ALIVE, "it stays out until it beats again"

    @rule(up=st.booleans())
    def own_link(self, up: bool) -> None:
        self.listening_since_s = self.now_s if up else None
        self.feed(LinkUp(self.now_s) if up else LinkDown(self.now_s))

    @rule(name=NAMES, boot=BOOTS)
    def a_healthy_agent_is_soon_online(self, name: str, boot: str) -> None:
        """One boot alone, for as long as it takes to be sure that no other is in charge."""
        for _ in range(4):
            self.now_s += 1.0
            self.beats[name, boot] = self.now_s
            self.feed(state(boot, self.now_s, "online", name))
            self.feed(info(boot, self.now_s, name))
            self.feed(beat(boot, self.now_s, name))
        assert self.fleet.devices[name].boot == boot
        assert self.presences()[name] is Presence.ONLINE

    @invariant()
    def nothing_impossible_was_counted(self) -> None:
        fleet: Fleet | None = getattr(self, "fleet", None)
        if fleet is not None:
            assert not [what for what in fleet.ignored if " in " in what], fleet.ignored

    @invariant()
    def who_is_alive_has_beaten_under_the_boot_in_charge(self) -> None:
        fleet: Fleet | None = getattr(self, "fleet", None)
        for name, device in (fleet.devices if fleet is not None else {}).items():
            if device.presence in ALIVE:
                assert (name, device.boot) in self.beats


AnyOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
