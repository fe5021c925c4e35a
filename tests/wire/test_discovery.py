"""Discovery over real multicast on 127.0.0.1. Each test has a site of its own: the machine may have other users."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from zeroconf import ServiceInfo, Zeroconf

from wire import discovery
from wire.advertisement import Role
from wire.discovery import Advertiser, Browser, Found, coordinator_properties, find_coordinator
from wire.errors import Unreachable
from wire.ids import new_boot_id

LOOPBACK = ["127.0.0.1"]


class Log:
    """Everything a browser reported, to wait on."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.gone: list[Found] = []
        self._news = threading.Condition()

    def on_found(self, found: Found) -> None:
        with self._news:
            self.found.append(found)
            self._news.notify_all()

    def on_gone(self, gone: Found) -> None:
        with self._news:
            self.gone.append(gone)
            self._news.notify_all()

    def wait(self, condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        with self._news:
            assert self._news.wait_for(condition, timeout_s), (self.found, self.gone)


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


@pytest.fixture
def site() -> str:
    return f"t{new_boot_id()}"


@pytest.fixture
def log(site: str) -> Iterator[Log]:
    log = Log()
    browser = Browser(log.on_found, log.on_gone, site, LOOPBACK)
    browser.start()
    yield log
    browser.close()


def advertised(site: str, name: str, role: Role, port: int = 0, http: int = 80) -> Advertiser:
    properties = coordinator_properties(http) if role == "coordinator" else {}
    advertiser = Advertiser(site, name, role, new_boot_id(), port, properties, LOOPBACK)
    advertiser.start()
    return advertiser


@pytest.fixture(scope="module")
def coordinator() -> Iterator[str]:
    """The site of a coordinator at port 18830 with HTTP at 18080, shared by tests that only look for it."""
    site = f"t{new_boot_id()}"
    with closing(advertised(site, "coordinator", "coordinator", 18830, http=18080)):
        find_coordinator(site, 15.0, LOOPBACK)
        yield site


def test_a_device_is_found_seen_to_change_and_seen_to_leave(site: str, log: Log) -> None:
    other = advertised(f"x{site}", "coordinator", "coordinator", 1883)
    mine = advertised(site, "pi5", "agent")
    log.wait(lambda: log.found)
    assert log.found[0].name == "pi5"
    assert log.found[0].addresses == ("127.0.0.1",)
    mine.update({"mem": "1024"})
    log.wait(lambda: log.found[-1].properties == {"mem": "1024"})
    mine.close()
    other.close()
    log.wait(lambda: log.gone)
    assert {found.site for found in log.found} == {site}, "another site was shown"
    mine.close()


def test_two_devices_of_one_name_are_both_seen_with_their_boot_ids(site: str, log: Log) -> None:
    first = advertised(site, "pi5", "agent")
    log.wait(lambda: log.found)
    second = advertised(site, "pi5", "agent")
    log.wait(lambda: len({found.boot for found in log.found}) == 2)
    assert eventually(lambda: {first.instance, second.instance} == {f"{site}-pi5", f"{site}-pi5-2"})
    first.close()
    second.close()


def test_a_restart_after_a_kill_is_an_update_with_a_new_boot_id(site: str, log: Log) -> None:
    program = textwrap.dedent(f"""
        import time
        from wire.discovery import Advertiser
        Advertiser({site!r}, "pi5", "agent", "aa", 0, {{}}, ["127.0.0.1"]).start()
        time.sleep(60)
    """)
    killed = subprocess.Popen([sys.executable, "-c", program])
    log.wait(lambda: log.found)
    killed.kill()
    killed.wait()
    with closing(advertised(site, "pi5", "agent")) as again:
        log.wait(lambda: len(log.found) == 2)
        assert again.instance == f"{site}-pi5"
    assert not log.gone[:-1]


def test_the_coordinator_of_a_site_is_found_and_its_port_and_address(coordinator: str) -> None:
    found = find_coordinator(coordinator, 10.0, LOOPBACK)
    assert (found.port, found.http_port, found.addresses) == (18830, 18080, ("127.0.0.1",))


def test_a_coordinator_that_is_not_there_is_said_with_who_was_seen_instead(coordinator: str, site: str) -> None:
    with pytest.raises(Unreachable) as caught:
        find_coordinator(site, 1.5, LOOPBACK)
    assert site in caught.value.message
    assert f"coordinator of site {coordinator} at 127.0.0.1" in caught.value.message
    assert "--broker" in caught.value.try_


def test_a_malformed_advertisement_is_counted_and_does_no_harm(site: str) -> None:
    log = Log()
    browser = Browser(log.on_found, log.on_gone, site, LOOPBACK)
    browser.start()
    radio = Zeroconf(interfaces=LOOPBACK)
    label = f"{site}-bad.{discovery.SERVICE_TYPE}"
    properties = {"role": "agent", "site": site, "id": "../..", "boot": "aa", "v": "1"}
    radio.register_service(
        ServiceInfo(discovery.SERVICE_TYPE, label, port=1, properties=properties, parsed_addresses=LOOPBACK)
    )
    assert eventually(lambda: browser.counters.malformed)
    radio.close()
    browser.close()
    assert not log.found


def test_a_host_that_gets_its_address_late_is_found_then(site: str, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    from wire.addresses import host_addresses  # the real one, for later

    has_address = threading.Event()
    real = host_addresses()

    def addresses() -> list[object]:
        loopback = [entry._replace(address="127.0.0.1") for entry in real[:1]]
        return list(loopback) if has_address.is_set() else []

    monkeypatch.setattr(discovery, "host_addresses", addresses)
    monkeypatch.setattr(discovery, "FOLLOW_PERIOD_S", 0.1)
    late = Advertiser(site, "late", "agent", new_boot_id(), 0, {})
    late.start()
    time.sleep(0.4)
    assert late.problem == "this host has no address yet"
    has_address.set()
    log.wait(lambda: log.found)
    assert eventually(lambda: late.problem == "")
    has_address.clear()
    log.wait(lambda: log.gone)
    late.close()


def test_an_address_that_this_host_does_not_have_is_named() -> None:
    with pytest.raises(Unreachable, match=r"\(this host has no address 192\.0\.2\.9\)"):
        find_coordinator("nobody", 0.3, ["192.0.2.9"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_an_ordinary_user_and_root_find_each_other_on_one_host(coordinator: str) -> None:
    program = textwrap.dedent(f"""
        import os, psutil
        from wire.discovery import Advertiser, find_coordinator
        os.setgid(65534), os.setuid(65534)
        found = find_coordinator("{coordinator}", 15.0, ["127.0.0.1"])
        mine = Advertiser("{coordinator}", "user", "agent", "aa", 0, {{}}, ["127.0.0.1"])
        mine.start()
        print(found.port, flush=True)
        input()
        mine.close()
    """)
    log = Log()
    user = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdin is not None
    assert user.stdout is not None
    assert user.stdout.readline() == "18830\n"
    browser = Browser(log.on_found, log.on_gone, coordinator, LOOPBACK)
    browser.start()
    log.wait(lambda: any(found.name == "user" for found in log.found))
    browser.close()
    user.communicate("\n")
    assert user.returncode == 0
