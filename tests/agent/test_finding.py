"""How an agent comes to its broker: told, found, remembered, lost and found elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent import control, finder
from agent.lifecycle import State
from agent.records import LastBroker, Records
from tests.agent.fakes import DEVICE, SITE, FakeLauncher, Lab, desired_of, nobody, order_of
from wire import topics
from wire.advertisement import Found
from wire.errors import Refused
from wire.memory import MemoryBroker
from wire.messages import Applied


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(finder, "SILENT_S", 0.1)
    monkeypatch.setattr(control, "DIAL_PATIENCE_S", 0.2)
    monkeypatch.setattr(control, "FIRST_TELL_S", 0.05)
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def dead_broker() -> MemoryBroker:
    broker = MemoryBroker()
    broker.stop()
    return broker


class Mdns:
    """Answers with `addresses`; None is silence."""

    def __init__(self, *addresses: str, site: str = SITE) -> None:
        self.addresses = addresses
        self.site = site
        self.asked: list[str | None] = []

    def __call__(self, site: str | None, timeout_s: float, interfaces: object) -> object:
        self.asked.append(site)
        if not self.addresses:
            return nobody(site, timeout_s, interfaces)
        return Found(
            role="coordinator", site=self.site, name="coordinator", boot="ab", addresses=self.addresses, port=1,
            protocol=1, properties={},
        )  # fmt: skip


def test_the_broker_that_mdns_finds_is_dialled_and_remembered(lab: Lab) -> None:
    service = lab.agent(broker="", site="", find=Mdns("10.0.0.1"))
    lab.turn(lambda: service.state is State.SERVING)
    assert lab.dialled == ["mqtt://10.0.0.1:1"]
    service.close()
    records = Records(service.config.state_dir)
    assert records.load("broker", LastBroker) == LastBroker(site=SITE, url="mqtt://10.0.0.1:1")
    records.close()


def test_while_mdns_is_silent_the_address_of_last_time_is_tried(lab: Lab) -> None:
    records = Records(lab.folder / "a" / "state")
    records.save("broker", LastBroker(site=SITE, url="mqtt://10.0.0.9:1"))
    records.close()
    service = lab.agent(broker="", find=Mdns())
    lab.turn(lambda: service.state is State.SERVING)
    assert lab.dialled == ["mqtt://10.0.0.9:1"]


def test_the_memory_of_another_site_is_not_used(lab: Lab) -> None:
    records = Records(lab.folder / "a" / "state")
    records.save("broker", LastBroker(site="elsewhere", url="mqtt://10.0.0.9:1"))
    records.close()
    mdns = Mdns()
    service = lab.agent(broker="", find=mdns)
    lab.turn(lambda: len(mdns.asked) >= 4)
    assert service.state is State.SEARCHING and lab.dialled == []


def test_of_several_addresses_the_one_that_answers_is_used(lab: Lab) -> None:
    lab.brokers["mqtt://172.17.0.1:1"] = dead_broker()
    service = lab.agent(broker="", find=Mdns("172.17.0.1", "10.0.0.1"))
    lab.turn(lambda: service.state is State.SERVING)
    assert lab.dialled == ["mqtt://172.17.0.1:1", "mqtt://10.0.0.1:1"]


def test_a_coordinator_that_moved_is_followed_and_workers_with_it(lab: Lab) -> None:
    mdns, launcher, first = Mdns("10.0.0.1"), FakeLauncher(), MemoryBroker()
    lab.brokers["mqtt://10.0.0.1:1"] = first
    service = lab.agent(launcher, broker="", find=mdns)
    lab.turn(lambda: service.state is State.SERVING)
    lab.store(service, b"graph", b"weights")
    service.desired(desired_of(order_of()))
    lab.turn(lambda: launcher.stage_workers == [1])
    mdns.addresses = ("10.0.0.2",)
    first.stop()
    lab.turn(lambda: service._control.url == "mqtt://10.0.0.2:1" and launcher.stage_workers == [2])

    def ready() -> bool:
        applied = lab.retained(topics.APPLIED, Applied)
        return isinstance(applied, Applied) and [report.phase for report in applied.stages] == ["ready"]

    lab.turn(ready)
    assert launcher.assignments[2].login.url == "mqtt://10.0.0.2:1"  # type: ignore[union-attr]
    assert service.config.name == DEVICE


def test_a_coordinator_of_another_site_is_not_followed(lab: Lab) -> None:
    mdns = Mdns("10.0.0.1")
    service = lab.agent(broker="", site="", find=mdns)
    lab.turn(lambda: service.state is State.SERVING)
    mdns.site, mdns.addresses = "elsewhere", ("10.0.0.3",)
    lab.broker.stop()
    asked = len(mdns.asked)
    lab.turn(lambda: len(mdns.asked) > asked)
    for _ in range(20):
        service.step(0.01)
    assert lab.dialled == ["mqtt://10.0.0.1:1"]


def test_several_sites_without_a_choice_are_told_once_and_the_agent_goes_on(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    def torn(site: str | None, timeout_s: float, interfaces: object) -> object:
        time.sleep(0.01)
        raise Refused("coordinators of 2 sites answered: a, b", try_="say which one: --site a")

    service = lab.agent(broker="", site="", find=torn)
    for _ in range(10):
        service.step(0.1)
    assert service.state is State.SEARCHING
    assert caplog.text.count("2 sites answered") == 1 and "--site a" in caplog.text


def test_an_absent_broker_is_told_once_and_tried_on(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.brokers["mqtt://10.0.0.9:1"] = dead_broker()
    service = lab.agent(broker="mqtt://10.0.0.9:1")
    deadline_s = time.monotonic() + 1.5
    while time.monotonic() < deadline_s:
        service.step(0.05)
    assert caplog.text.count("trying on") == 1 and "10.0.0.9" in caplog.text
    lab.brokers["mqtt://10.0.0.9:1"].start()
    lab.turn(lambda: service.state is State.SERVING)
