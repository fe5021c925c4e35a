"""`edgelam report` and the forms of `edgelam bench`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from coordinator.commands import bench
from hwprofiles.profile import Profile, save
from hwprofiles.report.document import Report, encode, make
from tests.coordinator.test_cli import Run, run, two_lines
from tests.hwprofiles.test_report_compare import times
from tests.hwprofiles.test_report_document import NOW, changed, measured
from tests.hwprofiles.test_verdict import good
from wire.errors import ExitCode

__all__ = ["run"]  # a fixture


def named(profile: Profile, device: str) -> Profile:
    return msgspec.structs.replace(profile, identity=msgspec.structs.replace(profile.identity, device=device))


@pytest.fixture
def shelf(tmp_path: Path) -> str:
    """A report of three boards in a file."""
    path = tmp_path / "shelf.json"
    boards = [named(good(), "slow"), named(times(good(), 0.5), "fast"), named(measured(), "odd")]
    path.write_bytes(encode(make(boards, NOW)))
    return str(path)


def test_show_gives_the_report_in_four_forms(run: Run, shelf: str, tmp_path: Path) -> None:
    assert "profile of fast: measured live" in run("report", "show", shelf).stdout
    assert "# profile of fast: measured live" in run("report", "show", shelf, "--markdown").stdout
    again = run("report", "show", shelf, "--json").stdout
    assert again.strip().encode() == Path(shelf).read_bytes()
    named = tmp_path / "named.html"
    assert run("report", "show", shelf, "-o", str(named)).returncode == 0
    assert named.read_text().startswith("<!DOCTYPE html>"), "the file's name says in which form"
    assert run("report", "show", shelf, "-o", str(tmp_path / "named.md")).returncode == 0
    assert (tmp_path / "named.md").read_text().startswith("# ")
    done = run("report", "show", shelf, "--html", "-o", str(tmp_path / "shelf.html"))
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "shelf.html").read_text().startswith("<!DOCTYPE html>")


def test_profiles_and_reports_become_one_report(run: Run, shelf: str, tmp_path: Path) -> None:
    save(named(good(), "alone"), tmp_path / "profile.json")
    done = run("report", "show", shelf, str(tmp_path / "profile.json"), "--json")
    made = msgspec.json.decode(done.stdout, type=Report)
    assert [board.device for board in made.boards] == ["slow", "fast", "odd", "alone"]


def test_two_forms_at_once_are_a_usage_error(run: Run, shelf: str) -> None:
    assert "exclude each other" in two_lines(run("report", "show", shelf, "--html", "--json"), ExitCode.USAGE)


def test_compare_says_the_ratio_of_two_boards(run: Run, shelf: str) -> None:
    words = ("report", "compare", shelf, shelf, "--board", "slow", "--board", "fast")
    assert "slow (A) against fast (B): VALID" in run(*words).stdout
    found = json.loads(run(*words, "--json").stdout)
    assert found["schema"] == "edgelam.comparison/1"
    assert [round(one["ratio"], 2) for one in found["ratios"] if one["part"] != "link"] == [0.5] * 7
    assert "<h1>slow (A) against fast (B)" in run(*words, "--html").stdout
    assert "| what |" in run(*words, "--markdown").stdout


def test_compare_refuses_unlike_conditions_with_what_differs(run: Run, shelf: str, tmp_path: Path) -> None:
    save(named(good(source="emulated", emulation="speed 0.5"), "slow"), tmp_path / "virtual.json")
    words = ("report", "compare", shelf, str(tmp_path / "virtual.json"), "--board", "slow")
    said = two_lines(run(*words), ExitCode.REFUSED)
    assert "unlike conditions: source: live against emulated" in said and "--anyway" in said
    done = run(*words, "--anyway")
    assert done.returncode == 0
    assert "(B): INVALID" in done.stdout and "Unlike conditions" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "which of slow, fast, odd?"),
        (("--board", "none"), "0 boards named 'none'; it has slow, fast, odd"),
        (("--board", "slow"), "compares a measurement with itself"),
        (("--board", "slow", "--board", "fast", "--board", "odd"), "more than twice"),
    ],
)
def test_compare_wants_to_know_which_boards(options: tuple[str, ...], said: str, run: Run, shelf: str) -> None:
    assert said in two_lines(run("report", "compare", shelf, shelf, *options), ExitCode.USAGE)


def test_export_writes_figures_or_samples(run: Run, shelf: str, tmp_path: Path) -> None:
    figures = run("report", "export", shelf).stdout.splitlines()
    assert figures[0].startswith("device,source,board_verdict") and len(figures) > 20
    run("report", "export", shelf, "--samples", "-o", str(tmp_path / "samples.csv"))
    assert len((tmp_path / "samples.csv").read_text().splitlines()) > 500


def test_a_report_that_was_changed_is_refused_by_all(run: Run, shelf: str) -> None:
    Path(shelf).write_bytes(changed(Path(shelf).read_bytes(), verdict="VALID"))
    for words in (("show", shelf), ("compare", shelf, shelf), ("export", shelf)):
        assert "does not follow from its samples" in two_lines(run("report", *words), ExitCode.FAILED)
    assert "can't read" in two_lines(run("report", "show", "none.json"), ExitCode.USAGE)


class There:
    """A coordinator with one board that has measured and one that has not."""

    doubt = ""

    def __enter__(self) -> There:
        return self

    def __exit__(self, *_: object) -> None: ...

    asked: ClassVar[list[Any]] = []

    def last(self, path: str, body: object, on_status: object) -> dict[str, Any]:
        self.asked.append(body)
        return {}

    def get(self, path: str) -> Any:
        if path == "/v1/devices":
            pi5 = {"device": "pi5", "profile": "live, 3 modules", "profile_doubted": self.doubt}
            return {"devices": [pi5, {"device": "new", "profile": "none"}]}
        assert path == "/v1/profiles/pi5"
        return msgspec.to_builtins(good())


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "client", lambda url, key: There())


def test_bench_gives_a_report_of_the_boards_that_have_measured(run: Run, site: None) -> None:
    done = run("bench", "--json")
    made = msgspec.json.decode(done.stdout, type=Report)
    assert done.returncode == 0
    assert ([board.device for board in made.boards], made.verdict, made.missing) == (["pi5"], "VALID", {})
    assert run("bench", "--html").stdout.startswith("<!DOCTYPE html>")


def test_bench_puts_boards_under_load_for_as_long_as_is_said(run: Run, site: None) -> None:
    assert run("bench", "pi5", "--sustained", "60").returncode == 0
    assert (There.asked[-1].sustained_s, There.asked[-1].devices) == (60.0, ("pi5",))
    assert run("bench").returncode == 0 and There.asked[-1].sustained_s == 0
    assert "too short to get warm" in two_lines(run("bench", "--sustained", "3"), ExitCode.USAGE)


def test_bench_of_the_fleet_names_boards_without_a_profile_and_says_so(run: Run, site: None) -> None:
    done = run("bench", "--fleet", "--json")
    made = msgspec.json.decode(done.stdout, type=Report)
    assert made.missing == {"new": "here, but it has measured nothing yet"}
    assert done.returncode == ExitCode.DEGRADED and "no profile of new" in done.stderr
    assert "some were named" in two_lines(run("bench", "pi5", "--fleet"), ExitCode.USAGE)


def test_bench_calls_a_board_invalid_whose_profile_is_not_believed(
    run: Run, site: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(There, "doubt", "took 9.8 times as long as its profile says (found on 2026-01-02 12:03)")
    assert "not believed: the board took 9.8 times as long" in " ".join(run("bench", "--markdown").stdout.split())
    path = str(tmp_path / "r.json")
    assert run("bench", "--json", "-o", path).returncode == 0
    made = msgspec.json.decode(Path(path).read_bytes(), type=Report)
    assert (made.verdict, made.boards[0].verdict) == ("INVALID", "INVALID") and set(made.doubted) == {"pi5"}
    again = msgspec.json.decode(run("report", "show", path, path, "--json").stdout, type=Report)
    assert [board.verdict for board in again.boards] == ["INVALID", "INVALID"]
    assert "9.8 times" in two_lines(run("plan", "smollm2", "--with", path, "--only-with"), ExitCode.REFUSED)
    mended = changed(Path(path).read_bytes(), doubted={})
    Path(path).write_bytes(mended)
    assert "does not follow" in two_lines(run("report", "show", path), ExitCode.FAILED)
