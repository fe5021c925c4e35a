"""`edgelam testbed`: which site it means when none is named, and that what it tells people to type is right."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from coordinator.cli import app
from coordinator.commands import testbed
from coordinator.config import Address, write_address
from coordinator.notices import boards_hint
from testbed import commands
from wire.addresses import DEFAULT_MQTT_PORT
from wire.discovery import find_coordinator
from wire.errors import Refused, Unreachable, UsageError
from wire.ids import site_option


class Asked(Refused):
    """Ends a command that would start boards, and holds what it asked for."""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(options: commands.UpOptions) -> None:
        error = Asked("asked")
        error.options = options  # type: ignore[attr-defined]
        raise error

    monkeypatch.setenv("EDGELAM_STATE", str(tmp_path))
    monkeypatch.setattr(commands, "up", refuse)
    return tmp_path


def coordinator_at(state: Path, site: str, pid: int) -> None:
    urls = {"http_url": "http://127.0.0.1:8571", "mqtt_url": "mqtt://127.0.0.1:8570"}
    write_address(state, Address(site=site, boot="b", pid=pid, broker="", **urls))


def asked(line: str) -> commands.UpOptions:
    """What `edgelam LINE` asks the testbed for."""
    with pytest.raises(Asked) as caught:
        app(shlex.split(line), standalone_mode=False)
    options = caught.value.options  # type: ignore[attr-defined]
    assert isinstance(options, commands.UpOptions)
    return options


def test_boards_belong_to_the_coordinator_that_runs_here(state: Path) -> None:
    assert asked("testbed up").site == "home"
    coordinator_at(state, "lab", os.getpid())
    assert asked("testbed up").site == "lab"
    assert asked("testbed up").state_dir == state / "testbed" / "lab"
    assert asked("testbed up --site shelf").site == "shelf"
    coordinator_at(state, "lab", 2**22 + 1)
    assert asked("testbed up").site == "home", "nobody runs it any more"


def test_the_door_of_the_coordinator_here_is_used_for_its_own_site_only(state: Path) -> None:
    coordinator_at(state, "lab", os.getpid())
    assert asked("testbed up --broker mqtt://127.0.0.1:8570").coordinator_http == "127.0.0.1:8571"
    assert asked("testbed up --broker 127.0.0.1:8570 --site shelf").coordinator_http == ""


def test_status_and_down_mean_the_only_testbed_that_is_up(state: Path) -> None:
    assert testbed.site_that_is_up() == "home"
    (state / "testbed" / "lab").mkdir(parents=True)
    (state / "testbed" / "lab" / "testbed.json").touch()
    assert testbed.site_that_is_up() == "lab"
    (state / "testbed" / "shelf").mkdir()
    (state / "testbed" / "shelf" / "testbed.json").touch()
    assert testbed.site_that_is_up() == "home"


@pytest.mark.parametrize("site", ["home", "lab"])
def test_what_people_are_told_to_type_means_the_site_at_hand(site: str, state: Path) -> None:
    hint = boards_hint(site)
    assert asked(hint.partition("or: edgelam ")[2]).site == site
    with pytest.raises(UsageError) as caught:
        app(["testbed", "status", "--site", site, "--state", str(state / "my boards")], standalone_mode=False)
    again = asked(caught.value.try_.removeprefix("edgelam "))
    assert (again.site, again.state_dir) == (site, state / "my boards")


@pytest.mark.parametrize("site", ["home", "lab"])
def test_without_a_coordinator_the_hint_names_its_site_and_its_own_port(site: str) -> None:
    with pytest.raises(Unreachable) as caught:
        find_coordinator(site, 0.1, ["127.0.0.1"])
    assert caught.value.try_.startswith(f"edgelam up{site_option(site)} on ")
    assert caught.value.try_.endswith(f"--broker mqtt://HOST:{DEFAULT_MQTT_PORT}")


def test_a_link_can_be_changed_only_where_a_board_is_up(state: Path) -> None:
    with pytest.raises(UsageError, match="no board 'pi4' is up here"):
        app(shlex.split("testbed link pi4 --rate 2 --delay 50"), standalone_mode=False)


def test_a_board_can_be_slowed_only_where_one_is_up(state: Path) -> None:
    with pytest.raises(UsageError, match="no board 'pi4' is up here"):
        app(shlex.split("testbed slow pi4 0.3"), standalone_mode=False)
    with pytest.raises(UsageError, match="a share of 3"):
        app(shlex.split("testbed slow pi4 3"), standalone_mode=False)
