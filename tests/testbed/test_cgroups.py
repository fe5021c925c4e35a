"""Limits by the kernel, where it lets us."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from testbed import cgroups
from testbed.boards import BoardSpec
from testbed.cgroups import Hierarchy, Unavailable
from testbed.commands import up
from tests.testbed.peers import Echo
from tests.testbed.test_testbed import gone, options, report
from wire.ids import new_boot_id


def why_not() -> str:
    try:
        cgroups.create(f"edgelam-probe-{new_boot_id()}", 1.0, 1 << 30).remove()
    except Unavailable as error:
        return error.message
    return ""


lab = [pytest.mark.lab, pytest.mark.skipif(bool(why_not()), reason=why_not() or "available")]


def test_version_2_is_taken_where_it_has_the_controllers_and_version_1_otherwise(tmp_path: Path) -> None:
    one = (
        f"cgroup /c/cpu cgroup rw,cpu,cpuacct 0 0\ncgroup /c/memory cgroup rw,memory 0 0\nc {tmp_path} cgroup2 rw 0 0\n"
    )
    (tmp_path / "cgroup.controllers").write_text("pids\n")
    assert cgroups.hierarchy(one) == Hierarchy(version=1, cpu=Path("/c/cpu"), memory=Path("/c/memory"))
    (tmp_path / "cgroup.controllers").write_text("cpu io memory pids\n")
    assert cgroups.hierarchy(one) == Hierarchy(version=2, cpu=tmp_path, memory=tmp_path)
    with pytest.raises(Unavailable, match="no cgroup hierarchy"):
        cgroups.hierarchy("tmpfs /tmp tmpfs rw 0 0\n")


def test_version_2_limits_are_written_as_the_kernel_wants_them(tmp_path: Path) -> None:
    group = cgroups.create("board", 0.25, 200 << 20, Hierarchy(version=2, cpu=tmp_path, memory=tmp_path))
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (tmp_path / "board" / "cpu.max").read_text() == "2500 10000"
    assert (tmp_path / "board" / "memory.max").read_text() == str(200 << 20)
    (tmp_path / "board" / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert group.oom_kills() == 1
    group.limit(0.01, 200 << 20)
    assert (tmp_path / "board" / "cpu.max").read_text() == "1000 10000", "the kernel takes no less"


def test_a_hierarchy_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    nowhere = tmp_path / "missing"
    with pytest.raises(Unavailable, match="can't make control group board: No such file"):
        cgroups.create("board", 1.0, 1 << 30, Hierarchy(version=1, cpu=nowhere, memory=nowhere))


def test_too_many_quotas_for_the_machine_are_warned_of() -> None:
    assert cgroups.overcommitted(1.5, 2) == ""
    assert "add up to 2.5 cores and this machine has 2" in cgroups.overcommitted(2.5, 2)


class TestLab:
    pytestmark = lab

    def test_a_quota_slows_a_saturated_load_and_can_be_changed_live(self) -> None:
        group = cgroups.create(f"edgelam-test-{new_boot_id()}", 0.25, 1 << 30)
        burn = (
            "import sys, time\n"
            "for _ in sys.stdin:\n"
            "    began, spent = time.monotonic(), time.process_time()\n"
            "    while time.monotonic() - began < 0.5: pass\n"
            "    print(time.process_time() - spent, flush=True)\n"
        )
        try:
            with subprocess.Popen(
                [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as load:
                assert load.stdin is not None
                assert load.stdout is not None
                group.add(load.pid)

                def spent() -> float:
                    load.stdin.write("\n")  # type: ignore[union-attr]
                    load.stdin.flush()  # type: ignore[union-attr]
                    return float(load.stdout.readline())  # type: ignore[union-attr]

                quarter = spent()
                group.limit(1.0, 1 << 30)
                whole = spent()
            assert quarter < 0.2, "0.125 s of 0.5 s"
            assert whole > 1.5 * quarter
        finally:
            group.remove()
        assert not any(folder.exists() for folder in group.folders)

    def test_a_process_that_takes_too_much_memory_is_killed_and_counted(self) -> None:
        group = cgroups.create(f"edgelam-test-{new_boot_id()}", 1.0, 100 << 20)
        try:
            eat = "input(); x = b'1' * (300 << 20)"
            with subprocess.Popen([sys.executable, "-c", eat], stdin=subprocess.PIPE) as hungry:
                group.add(hungry.pid)
                hungry.communicate(b"\n")
            assert hungry.returncode == -9
            assert group.oom_kills() == 1
        finally:
            group.remove()

    def test_a_group_with_somebody_in_it_is_emptied_and_removed(self) -> None:
        group = cgroups.create(f"edgelam-test-{new_boot_id()}", 1.0, 1 << 30)
        with subprocess.Popen(["sleep", "600"]) as left:
            group.add(left.pid)
            began = time.monotonic()
            group.remove()
            assert time.monotonic() - began < 3
            assert left.wait() == -9
        group.remove()

    def test_boards_of_a_testbed_live_in_groups_that_go_with_it(self, tmp_path: Path) -> None:
        echo = Echo()
        board = BoardSpec(name="pi4", speed=0.25, memory_bytes=300 << 20)
        with up(options(echo, tmp_path / "bed", board, BoardSpec(name="big", speed=1.0), limits="cgroup")) as bed:
            written = report(tmp_path / "bed", "pi4")
            assert not [argument for argument in written["arguments"] if argument.startswith("--emulate")]
            groups = [Path(group) for group in bed.state.groups]
            assert all(group.is_dir() for group in groups)
            members = " ".join((group / "cgroup.procs").read_text() for group in groups if "pi4" in group.name).split()
            assert {str(written["pid"]), str(written["worker"])} <= set(members)
        assert not any(group.exists() for group in groups)
        assert gone(written["pid"])
        echo.close()
