"""Whatever is killed, in whatever order, the site comes back to what was wanted, and the next request works."""

from __future__ import annotations

import random
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e import losses
from tests.e2e.garbage import READ_BY_COORDINATOR, Vandal
from tests.e2e.site import Site, board_names
from wire import topics
from wire.broker import start_broker
from wire.errors import Unreachable

ALL_ONLINE = dict.fromkeys(board_names(3), "online")


@pytest.mark.slow
def test_a_killed_broker_is_started_again_and_all_retained_state_comes_back(site: Site, tiny_model: str) -> None:
    before = site.run(tiny_model, 2)
    losses.kill_broker(site, "")
    time.sleep(0.5)
    deadline_s = time.monotonic() + 30
    while not site.get("/v1/status")["broker_up"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    site.await_states(ALL_ONLINE)
    after = site.run(tiny_model, 2)
    assert after["token_ids"] == before["token_ids"]
    assert after["epoch"] == before["epoch"], "a broker that died is no reason to move anything"


def test_a_killed_coordinator_comes_back_with_the_deployment_and_its_epoch(site: Site, tiny_model: str) -> None:
    before = site.run(tiny_model, 2)
    site.coordinator.kill()
    site.restart_coordinator()
    site.await_states(ALL_ONLINE)
    after = site.run(tiny_model, 2)
    assert after["token_ids"] == before["token_ids"]
    assert after["epoch"] == before["epoch"]


def test_boards_leave_the_broker_of_another_site_that_stands_where_ours_was(
    site: Site, tiny_model: str, tmp_path: Path
) -> None:
    before = site.run(tiny_model, 2)
    old_url = site.get("/v1/status")["mqtt_url"]
    site.coordinator.kill()
    deadline_s = time.monotonic() + 20
    while True:
        try:
            foreign = start_broker(tmp_path, "127.0.0.1", int(old_url.rsplit(":", 1)[1]))
            break
        except Unreachable:  # our own broker is still about to end
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
    try:
        site.restart_coordinator()
        assert site.get("/v1/status")["mqtt_url"] != old_url
        site.await_states(ALL_ONLINE)
        after = site.run(tiny_model, 2)
    finally:
        foreign.stop()
    assert after["token_ids"] == before["token_ids"]
    assert after["epoch"] == before["epoch"]


def test_a_killed_board_is_replaced_and_used_again_when_it_returns(site: Site, tiny_model: str) -> None:
    before = site.run(tiny_model, 3)
    site.boards.kill("board2")
    site.await_states({**ALL_ONLINE, "board2": "offline"})
    without = site.run(tiny_model, 2)
    assert without["token_ids"] == before["token_ids"]
    assert without["epoch"] > before["epoch"]
    site.boards.start("board2")
    site.await_states(ALL_ONLINE)
    assert site.run(tiny_model, 3)["token_ids"] == before["token_ids"]


def test_a_killed_worker_is_started_again_by_its_agent(site: Site, tiny_model: str) -> None:
    before = site.run(tiny_model, 3)
    agents = [psutil.Process(board.pid) for board in site.boards.status().boards]
    workers = [child for agent in agents for child in agent.children(recursive=True)]
    victim = next(child for child in workers if "agent.workers.inference" in " ".join(child.cmdline()))
    victim.kill()
    time.sleep(0.5)
    deadline_s = time.monotonic() + 30
    while not site.get("/v1/status")["deployments"][0]["ready"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert site.run(tiny_model, 3)["token_ids"] == before["token_ids"]


def refused_frames(site: Site) -> int:
    return sum(row["refused_frames"] for device in site.get("/v1/devices")["devices"] for row in device["counters"])


def test_ten_thousand_damaged_messages_on_every_topic_arrive_are_refused_and_change_nothing(
    site: Site, tiny_model: str
) -> None:
    before = site.run(tiny_model, 3)
    vandal = Vandal(site.address["mqtt_url"], site.coordinator.site)
    try:
        assert site.run(tiny_model, 3)["token_ids"] == before["token_ids"]
        said = (topics.TELEMETRY, topics.INBOX, *(row for row in topics.TABLE if row.retained))

        def all_said() -> bool:
            return set(said) <= {found[0] for topic in vandal.samples if (found := topics.match(topic))}

        assert vandal.poll_until(all_said, 10.0), sorted(vandal.samples)
        vandal.add_what_was_not_said("board1")
        refused, frames = site.get("/v1/status")["refused_messages"], refused_frames(site)
        sent = vandal.smash(10_000, random.Random(7))
        assert set(sent) == set(topics.TABLE)
        # Half of all went at QoS 1, which the broker must pass on; of the other half it may drop what is too much.

        def all_arrived() -> bool:
            return all(vandal.arrived[row] >= count // 2 for row, count in sent.items())

        assert vandal.poll_until(all_arrived, 15.0), dict(vandal.arrived)
        to_coordinator = sum(sent[row] for row in READ_BY_COORDINATOR)

        def refused_now() -> int:
            return int(site.get("/v1/status")["refused_messages"]) - refused

        vandal.poll_until(lambda: refused_now() >= to_coordinator, 5.0)
        assert to_coordinator // 2 <= refused_now() <= to_coordinator
        assert vandal.poll_until(lambda: refused_frames(site) > frames, 10.0), "the stages refuse their share"
        assert "refused so far" in site.boards.log("board1").read_text(), "and so do the agents"
    finally:
        vandal.close()
    site.await_states(ALL_ONLINE)
    after = site.run(tiny_model, 3)
    assert after["token_ids"] == before["token_ids"]
    assert after["epoch"] == before["epoch"], "garbage is no reason to move anything"
    keeper = Vandal(site.address["mqtt_url"], site.coordinator.site)
    keeper.poll_until(lambda: False, 0.5)
    assert keeper.retained.keys() == vandal.retained.keys()
    assert not vandal.ours & set(keeper.retained.values()), "nothing of it is retained"
    keeper.close()
