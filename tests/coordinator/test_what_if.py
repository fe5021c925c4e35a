"""`edgelam plan --with`: boards that are not there, from profiles in files, with and without a coordinator."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.journal import DeployRequest
from coordinator.planning.absent import AssumedLink, as_measured
from coordinator.planning.cost import link_cost
from coordinator.planning.plan import Plan
from coordinator.planning.planner import Candidate
from coordinator.planning.slowed import Slowed
from coordinator.shelf import Shelf
from coordinator.whatif import what_if
from hwprofiles.profile import MAX_AGE_S, Profile, save
from hwprofiles.reading import Absent
from hwprofiles.report import document
from tests.coordinator.test_cli import Run, run, two_lines
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from tests.planning import boards
from wire.errors import ExitCode
from wire.ids import is_name

__all__ = ["run"]  # a fixture

MB = boards.MB


def keyed(profile: Profile, keys: dict[str, str]) -> Profile:
    """Measured now, on the modules with these keys (kind -> key)."""
    modules = tuple(msgspec.structs.replace(module, key=keys[module.kind]) for module in profile.modules)
    held = msgspec.structs.replace(profile.conditions, measured_at_unix=time.time())
    return msgspec.structs.replace(profile, modules=modules, conditions=held)


class Shelfful:
    """A tiny model, and files of boards that have measured its modules."""

    def __init__(self, folder: Path) -> None:
        config = tiny_config()
        write_gguf(folder / "tiny.gguf", config, random_tensors(config))
        self.model = str(folder / "tiny.gguf")
        self.folder = folder / "profiles"
        self.folder.mkdir()
        packed = asyncio.run(Shelf(folder / "cache").prepare(self.model, "f32", lambda _text: None)).packed
        self.keys = {module.kind: module.profile_key for module in packed.graph.modules}

    def profile(self, name: str, speed: float = 1.0, **changes: Any) -> Profile:
        fields = {"block_s": 4e-3 / speed, "head_s": 4e-3 / speed, "link_to_broker": boards.link(1e-3, 100e6 / 8)}
        return keyed(boards.profile(name, **{**fields, **changes}), self.keys)

    def file(self, profile: Profile, name: str = "") -> str:
        path = self.folder / f"{name or profile.identity.device}.json"
        save(profile, path)
        return str(path)


@pytest.fixture
def shelf(run: Run, tmp_path: Path) -> Shelfful:
    run.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    return Shelfful(tmp_path)


def asked(run: Run, shelf: Shelfful, *words: str) -> Any:
    done = run("plan", shelf.model, "--precision", "f32", "--context", "64", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in words else done.stdout


def refused(run: Run, shelf: Shelfful, code: ExitCode, *words: str) -> str:
    """The error, behind what was said of packing."""
    done = run("plan", shelf.model, "--precision", "f32", "--context", "64", *words)
    lines = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("... ")]
    return two_lines(done._replace(stderr="".join(lines)), code)


def test_boards_that_are_not_there_are_planned_for_without_a_coordinator(run: Run, shelf: Shelfful) -> None:
    pi5, pi4 = shelf.file(shelf.profile("pi5")), shelf.file(shelf.profile("pi4", 0.5))
    found = asked(run, shelf, "--with", pi5, pi4, "--only-with", "--boards-at-least", "2", "--json")
    assert found["schema"] == "edgelam.what-if/1" and found["deployable"] is False
    assert sorted(stage["device"] for stage in found["plan"]["stages"]) == ["pi4*", "pi5*"]
    assert [(board["device"], board["file"]) for board in found["absent"]] == [("pi5*", pi5), ("pi4*", pi4)]
    shares = {stage["device"]: stage["end_block"] - stage["first_block"] for stage in found["plan"]["stages"]}
    assert shares["pi5*"] > shares["pi4*"]


def test_text_says_first_that_it_is_predicted_and_no_plan_to_deploy(run: Run, shelf: Shelfful) -> None:
    pi5 = shelf.file(shelf.profile("pi5"))
    for words in ((), ("--explain",)):
        text = asked(run, shelf, "--with", pi5, "--only-with", *words)
        assert text.startswith("WHAT IF: predicted for 1 board that is not there (marked *).")
        assert "can't be deployed" in text.splitlines()[0]
        assert "link as measured where it was: 100 Mbit/s, 1.1 ms one way" in text
    assert "what would change the answer" in text


def test_several_of_one_board_and_a_folder_of_boards(run: Run, shelf: Shelfful) -> None:
    pi5 = shelf.file(shelf.profile("pi5"))
    found = asked(run, shelf, "--with", f"{pi5}*3", "--only-with", "--boards-at-least", "3", "--json")
    assert sorted(stage["device"] for stage in found["plan"]["stages"]) == ["pi5*1", "pi5*2", "pi5*3"]
    shelf.file(shelf.profile("pi4"))
    found = asked(run, shelf, "--with", str(shelf.folder), "--only-with", "--exclude", "pi4*", "--json")
    assert [board["device"] for board in found["absent"]] == ["pi4*", "pi5*"]
    assert [stage["device"] for stage in found["plan"]["stages"]] == ["pi5*"]


def test_a_report_gives_all_of_its_boards(run: Run, shelf: Shelfful) -> None:
    path = shelf.folder / "report.json"
    path.write_bytes(document.encode(document.make([shelf.profile("a"), shelf.profile("b")], time.time())))
    found = asked(run, shelf, "--with", str(path), "--only-with", "--json")
    assert [board["device"] for board in found["absent"]] == ["a*", "b*"]


def test_a_link_is_assumed_and_said_to_be(run: Run, shelf: Shelfful) -> None:
    pi5 = shelf.file(shelf.profile("pi5", link_to_broker=Absent("no broker")))
    words = ("--with", f"{pi5}*2", "--only-with", "--boards-at-least", "2")
    told = refused(run, shelf, ExitCode.REFUSED, *words)
    assert "no broker" in told and "assume a link for pi5*1, pi5*2: --link-rate" in told
    text = asked(run, shelf, *words, "--link-rate", "20", "--link-delay", "5")
    assert "link assumed: 20 Mbit/s, 5.0 ms one way" in text
    found = asked(run, shelf, *words, "--link-rate", "20", "--link-delay", "5", "--json")
    assert all(board["link_assumed"] for board in found["absent"])
    assert found["plan"]["stages"][0]["hop_s"] == pytest.approx(2 * (5e-3 + 1200 / 2.5e6), rel=1e-3)


@pytest.mark.parametrize(("rate", "delay_s"), [(1e3, 0.0), (2.5e6, 5e-3), (125e6, 0.3), (125e8, 10.0)])
def test_an_assumed_link_is_priced_as_it_was_assumed(rate: float, delay_s: float) -> None:
    profile = boards.profile("pi5", link_to_broker=as_measured(AssumedLink(rate_bytes_per_s=rate, delay_s=delay_s)))
    cost, because = link_cost(profile)
    assert cost is not None and not because
    assert cost.one_way_s == pytest.approx(delay_s + 1200 / rate)
    if delay_s < 1:
        assert cost.bytes_per_s == pytest.approx(rate)


def test_with_a_coordinator_its_boards_count_too(run: Run, shelf: Shelfful) -> None:
    """None is there, which is said with what to do instead."""
    pi5 = shelf.file(shelf.profile("pi5"))
    said = refused(run, shelf, ExitCode.UNREACHABLE, "--with", pi5)
    assert "no coordinator" in said and "--only-with" in said


class There:
    """A coordinator that has one board, slower than it measured, some of whose memory is taken."""

    def __init__(self, profile: Profile) -> None:
        slow = Slowed(times=2.0, because="runs at 0.50 of its profile since 12:03")
        self.board = Candidate(device="orin", profile=profile, usable_memory_bytes=300 * MB, slowed=slow)
        self.asked: list[DeployRequest] = []

    def last(self, path: str, request: DeployRequest, _on_status: Any) -> dict[str, Any]:
        assert path == "/v1/candidates"
        self.asked.append(request)
        return {"event": "candidates", "candidates": msgspec.to_builtins([self.board])}


def test_boards_that_are_there_keep_their_names_memory_and_slowness(shelf: Shelfful) -> None:
    there = There(shelf.profile("orin"))
    request = DeployRequest(
        model=shelf.model, precision="f32", context_tokens=64, boards_at_least=2, excluded=("pi5*2",)
    )
    files = [("pi5.json", shelf.profile("pi5"))] * 2
    found = what_if(request, files, there, None, lambda _text: None)  # type: ignore[arg-type]
    stages = {stage.device: stage for stage in found.plan.stages}
    assert set(stages) == {"orin", "pi5*1"} and found.there == ("orin",)
    assert "runs at 0.50 of its profile since 12:03" in stages["orin"].because
    assert stages["orin"].memory_limit_bytes < 300 * MB
    assert "for 2 boards that are not there (marked *), beside 1 that is. 1 of them" in found.text_before()[0]
    assert there.asked[0].excluded == (), "the coordinator has never heard of pi5*2"


def test_no_message_takes_the_name_of_a_board_that_is_not_there(shelf: Shelfful) -> None:
    """However it came to a coordinator, it could be sent to nobody."""
    found = what_if(
        DeployRequest(model=shelf.model, precision="f32", context_tokens=64),
        [("pi5.json", shelf.profile("pi5"))], None, None, lambda _text: None,
    )  # fmt: skip
    [stage] = found.plan.stages
    assert not is_name(stage.device)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(found.document(), type=Plan)


def spoiled(data: bytes, **changes: Any) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(data), **changes})


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (lambda data: data[:-30], ExitCode.FAILED, "neither a report nor a profile"),
        (lambda data: b"", ExitCode.FAILED, "neither a report nor a profile"),
        (lambda data: spoiled(data, schema="edgelam.profile/2"), ExitCode.FAILED, "of a later version"),
        (lambda data: data.replace(b"0.004", b"0.0004"), ExitCode.FAILED, "changed after it was measured"),
        (lambda data: spoiled(data, modules="fast"), ExitCode.FAILED, "neither a report nor a profile"),
        (lambda data: b"[" * 10**6, ExitCode.FAILED, "neither a report nor a profile"),
    ],
)
def test_damaged_and_future_profiles_are_refused_and_kept(
    run: Run, shelf: Shelfful, damage: Any, code: ExitCode, said: str
) -> None:
    path = Path(shelf.file(shelf.profile("pi5")))
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    told = two_lines(run("plan", shelf.model, "--with", str(path), "--only-with"), code)
    assert said in told and str(path) in told
    assert path.read_bytes() == before


def test_expired_profiles_are_refused_unless_they_are_wanted(run: Run, shelf: Shelfful) -> None:
    for days, said in ((-45.0, "was measured 45 days ago"), (9.0, "was measured 9 days from now")):
        profile = shelf.profile("pi5")
        then = msgspec.structs.replace(profile.conditions, measured_at_unix=time.time() + 86_400 * days)
        path = shelf.file(msgspec.structs.replace(profile, conditions=then))
        told = two_lines(run("plan", shelf.model, "--with", path, "--only-with"), ExitCode.REFUSED)
        assert said in told and path in told and "--accept-expired" in told
        assert "pi5*" in asked(run, shelf, "--with", path, "--only-with", "--accept-expired")
    assert MAX_AGE_S == 30 * 86_400


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only-with",), "--only-with is about boards of --with"),
        (("--link-rate", "5"), "--link-rate is about boards of --with"),
        (("other.json",), "one model at a time: what is 'other.json'?"),
        (("--with", "none.json"), "can't read none.json"),
        (("--with", "x.json*0"), "x.json*0: 0 boards"),
        (("--with", "x.json*999"), "x.json*999: 999 boards"),
    ],
)
def test_words_that_mean_nothing_are_usage_errors(run: Run, words: tuple[str, ...], said: str) -> None:
    assert said in two_lines(run("plan", "smollm2", *words), ExitCode.USAGE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--link-rate", "5"), "go together"),
        (("--link-rate", "nan", "--link-delay", "1"), "a link of nan Mbit/s is not possible"),
        (("--link-rate", "5", "--link-delay", "-1"), "a delay of -1 ms is not possible"),
        (("--topology", "direct"), "no plan can go directly"),
        (("--exclude", "nobody"), "no board 'nobody' to leave out"),
    ],
)
def test_boards_that_are_not_there_have_their_limits(
    run: Run, shelf: Shelfful, words: tuple[str, ...], said: str
) -> None:
    pi5 = shelf.file(shelf.profile("pi5"))
    assert said in refused(run, shelf, ExitCode.USAGE, "--with", pi5, "--only-with", *words)


def test_65_boards_are_too_many(run: Run, shelf: Shelfful) -> None:
    pi5 = shelf.file(shelf.profile("pi5"))
    told = run("plan", shelf.model, "--with", f"{pi5}*60", f"{pi5}*5", "--only-with")
    assert "65 boards: a plan takes 64" in told.stderr and told.returncode == int(ExitCode.USAGE)
