"""A recording replays to the readings it was taken with, and holds nothing that names anybody."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cli
from hwprofiles import archive, record
from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.scrub import Scrubber, Secrets, live_secrets
from tests.hwprofiles.test_probe import CONTAINER, FIXTURES, GUEST, PI, put
from tests.hwprofiles.test_sensors import hwmon, package
from wire.errors import CorruptData, ExitCode, Refused, UsageError

NOBODY = Secrets((), ())


def comparable(readings: record.Readings) -> record.Readings:
    """Without what is never recorded (addresses) or is of whoever reads (time, our own versions)."""
    identity = readings.survey.identity
    interfaces = tuple(msgspec.structs.replace(one, addresses=()) for one in identity.interfaces)
    survey = readings.survey._replace(identity=msgspec.structs.replace(identity, interfaces=interfaces))
    conditions = msgspec.structs.replace(readings.conditions, at_unix=0.0, at_mono_s=0.0)
    return readings._replace(survey=survey, conditions=conditions)


def replayed(recording: record.Recording, folder: Path) -> record.Readings:
    archive.write(recording, folder, 1.8e9)
    return record.read(folder)


@pytest.mark.parametrize("root", sorted(FIXTURES.iterdir()), ids=lambda root: root.name)
def test_recording_of_a_recorded_board_replays_to_the_same_readings(root: Path, tmp_path: Path) -> None:
    recording = record.take(root, secrets=NOBODY)
    assert comparable(replayed(recording, tmp_path / "again")) == comparable(record.read(root))


def test_recording_of_this_machine_replays_to_the_same_readings(tmp_path: Path) -> None:
    recording = record.take(secrets=NOBODY)
    again = comparable(replayed(recording, tmp_path / "again"))
    then = comparable(recording.readings)
    # Paths of engines and of groups may hold identifiers, which are replaced in what is kept.
    names = {name: found for name, found in then.survey.engines.items() if isinstance(found, Reading)}
    assert {name: found.value for name, found in again.survey.engines.items() if isinstance(found, Reading)} == {
        name: found.value for name, found in names.items()
    }
    assert again.board == then.board
    assert again.conditions == then.conditions
    assert again.survey.identity == then.survey.identity
    assert again.survey.cores == then.survey.cores
    assert again.survey.memory.total_bytes == then.survey.memory.total_bytes
    assert again.survey.memory.available_bytes == then.survey.memory.available_bytes


def test_sensors_failures_and_programs_are_in_the_recording(tmp_path: Path) -> None:
    board = tmp_path / "board"
    hwmon(board, "1-0040", ("VDD_IN", 5000, 1000))
    package(board, "intel-rapl:0", "package-0", 5)
    (board / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    put(board, "UNREADABLE", "EACCES /sys/class/powercap/intel-rapl:0/energy_uj\n")
    put(board, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    put(board, "proc/secret", "nobody reads this")
    recording = record.take(board, lambda command: Failed("no access to /dev/vcio"), NOBODY)
    assert "proc/secret" not in recording.contents
    assert recording.contents["commands/vcgencmd-get_throttled.failed"] == b"no access to /dev/vcio\n"
    assert recording.contents["proc/device-tree/model"].endswith(b"\0")
    again = replayed(recording, tmp_path / "again")
    assert again.board.throttle == Failed("no access to /dev/vcio")
    assert isinstance(again.board.energy_counters, Failed)
    assert again.board == recording.readings.board


def test_reading_twice_while_recording_gives_the_content_that_is_kept(tmp_path: Path) -> None:
    put(tmp_path, "a", "1")
    with files.watched() as looked:
        first = files.text(tmp_path, "a")
        put(tmp_path, "a", "2")
        assert files.text(tmp_path, "a") == first
    assert looked.contents == {"a": b"1"}
    assert files.text(tmp_path, "a") == Reading("2", "/a")


def test_host_user_serial_and_addresses_are_removed_everywhere_and_said() -> None:
    scrubber = Scrubber(Secrets(("workbench7", "alice"), ("10000000abcdef01",)))
    text = (
        "host workbench7 in /home/alice/x serial 10000000abcdef01 at 192.168.7.31 and fe80::1ff:fe23:4567:890a "
        "mac dc:a6:32:01:02:03 on enxdca632010203 id 3f2b1c4d-0000-4000-8000-0123456789ab"
    )
    found = scrubber.text(text)
    for secret in ("workbench7", "alice", "abcdef01", "192.168", "4567", "a6:32", "a632", "3f2b"):
        assert secret not in found
    assert set(scrubber.removed) == {
        "name of host or user",
        "serial number",
        "IP address",
        "MAC address",
        "identifier",
    }
    assert scrubber.text("alice") == scrubber.text("alice"), "the same secret always by the same word"


@pytest.mark.parametrize(
    "text",
    [
        "07-29-2026 18:00:27 RAM",
        "R36.4.3",
        "malice aforethought",
        "::1 127.0.0.1",
        "5000mW/4000mW",
        "nvidia,p3767-0005",
    ],
)
def test_times_versions_and_figures_are_left_alone(text: str) -> None:
    assert Scrubber(Secrets(("alice",), ())).text(text) == text


def test_versions_of_engines_are_no_addresses() -> None:
    scrubber = Scrubber(NOBODY)
    assert scrubber.content("engines.json", b'"10.3.0.26"') == b'"10.3.0.26"'
    assert b"10.3.0.26" not in scrubber.content("etc/hosts", b"10.3.0.26")


@given(st.binary(max_size=200))
def test_content_that_is_no_text_passes(data: bytes) -> None:
    Scrubber(Secrets(("alice",), ())).content("proc/device-tree/model", data)


def test_serial_in_cpuinfo_and_mounts_that_are_not_groups_are_cut() -> None:
    scrubber = Scrubber(NOBODY)
    assert scrubber.content("proc/cpuinfo", b"Model : Pi\nSerial\t: 1000\n") == b"Model : Pi\n"
    mounts = b"1 0 8:1 / /home/me rw - ext4 /dev/sda rw\n2 1 0:3 / /sys/fs/cgroup rw - cgroup2 c rw\n"
    assert scrubber.content("proc/self/mountinfo", mounts) == mounts.splitlines(keepends=True)[1]
    assert "mounts other than control groups" in scrubber.removed


def test_group_named_after_a_user_is_found_again_under_its_new_name(tmp_path: Path) -> None:
    board = tmp_path / "board"
    put(board, "proc/self/cgroup", "0::/alice/app\n")
    put(board, "proc/self/mountinfo", "36 25 0:32 / /sys/fs/cgroup rw - cgroup2 c rw\n")
    put(board, "sys/fs/cgroup/cgroup.controllers", "memory")
    put(board, "sys/fs/cgroup/alice/memory.max", "4096")
    recording = record.take(board, secrets=Secrets(("alice",), ()))
    limit = replayed(recording, tmp_path / "again").survey.memory.limit_bytes
    assert isinstance(limit, Reading) and limit.value == 4096 and "alice" not in limit.source


def test_names_that_thousands_of_boards_have_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "raspberrypi")
    monkeypatch.setenv("USER", "nvidia")
    monkeypatch.setenv("LOGNAME", "pi")
    monkeypatch.setenv("SUDO_USER", "maria")
    names = live_secrets().names
    assert "maria" in names and not {"raspberrypi", "nvidia", "pi", ""} & set(names)


def test_too_large_a_recording_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_RECORDING_BYTES", 100)
    with pytest.raises(Refused, match="recording"):
        record.take(PI, secrets=NOBODY)


# archives


def test_archive_and_folder_hold_the_same_and_name_no_owner(tmp_path: Path) -> None:
    recording = record.take(PI, secrets=NOBODY)
    archive.write(recording, tmp_path / "pi.tar.gz", 1.8e9)
    archive.write(recording, tmp_path / "pi", 1.8e9)
    with tarfile.open(tmp_path / "pi.tar.gz") as packed:
        assert all((entry.uid, entry.gid, entry.uname, entry.gname) == (0, 0, "", "") for entry in packed)
    with archive.opened(tmp_path / "pi.tar.gz") as unpacked:
        assert comparable(record.read(unpacked)) == comparable(record.read(tmp_path / "pi"))
    assert not unpacked.exists()
    source = (tmp_path / "pi" / "SOURCE").read_text()
    assert all(what in source for what in recording.removed) and "2027-01-15" in source


def test_output_that_exists_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    recording = record.take(GUEST, secrets=NOBODY)
    (tmp_path / "there.tar.gz").write_bytes(b"mine")
    for output in (tmp_path, tmp_path / "there.tar.gz", tmp_path / "there.tar.gz" / "below"):
        with pytest.raises(UsageError):
            archive.write(recording, output, 1.8e9)
    assert (tmp_path / "there.tar.gz").read_bytes() == b"mine"


def packed(path: Path, *entries: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for entry in entries:
            made.addfile(entry, io.BytesIO(b"x" * entry.size))
    return path


def entry(name: str, size_bytes: int = 1, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = size_bytes, kind, "/etc/passwd"
    return made


@pytest.mark.parametrize(
    "bad",
    [
        entry("../outside"),
        entry("/etc/outside"),
        entry("a/../../outside"),
        entry("link", 0, tarfile.SYMTYPE),
        entry("hard", 0, tarfile.LNKTYPE),
        entry("pipe", 0, tarfile.FIFOTYPE),
        entry("bomb", record.MAX_RECORDING_BYTES + 1),
    ],
    ids=lambda made: made.name,
)
def test_hostile_archive_is_refused_and_writes_nothing_outside(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    path = packed(tmp_path / "bad.tar.gz", bad)
    with pytest.raises(CorruptData), archive.opened(path):
        pytest.fail("unpacked")
    assert [one.name for one in tmp_path.iterdir()] == ["bad.tar.gz"]


@pytest.mark.parametrize("data", [b"", b"not an archive", b"\x1f\x8b\x08\x00garbage"])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar.gz").write_bytes(data)
    with pytest.raises(CorruptData), archive.opened(tmp_path / "x.tar.gz"):
        pytest.fail("unpacked")


def test_truncated_archive_is_refused(tmp_path: Path) -> None:
    archive.write(record.take(PI, secrets=NOBODY), tmp_path / "pi.tar.gz", 1.8e9)
    whole = (tmp_path / "pi.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptData), archive.opened(tmp_path / "cut.tar.gz"):
        pytest.fail("unpacked")


# the command line


def test_record_and_replay_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "here.tar.gz"
    began_s = time.monotonic()
    assert cli.main(["record", "--output", str(output)]) == ExitCode.OK
    assert time.monotonic() - began_s < 30
    assert "removed" in capsys.readouterr().out and output.stat().st_size < record.MAX_RECORDING_BYTES
    assert cli.main(["info", "--replay", str(output)]) == ExitCode.OK
    assert "REPLAYED" in capsys.readouterr().out.splitlines()[0]
    assert cli.main(["info", "--replay", str(CONTAINER), "--json"]) == ExitCode.OK
    shown = json.loads(capsys.readouterr().out)
    assert shown["source"] == "replayed" and shown["survey"]["cores"]["usable"] == 0.25
    assert shown["board"]["power"]["type"] == "absent"


def test_replay_of_nothing_says_how_to_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--replay", "/nowhere"]) == ExitCode.USAGE
    assert "edgelam-agent record" in capsys.readouterr().err


def test_absent_program_is_absent_again(tmp_path: Path) -> None:
    recording = record.take(PI, lambda command: Absent("no program vcgencmd"), NOBODY)
    assert not any(path.startswith("commands/") for path in recording.contents)
    assert isinstance(replayed(recording, tmp_path / "again").board.throttle, Absent)


def test_large_files_are_read_whole_up_to_the_limit(tmp_path: Path) -> None:
    for size in (4095, 4096, 4097, 100_000):
        put(tmp_path, "big", "x" * size)
        found = files.text(tmp_path, "big")
        assert isinstance(found, Reading) and len(found.value) == size
    put(tmp_path, "big", "x" * (files.MAX_FILE_BYTES + 10))
    found = files.text(tmp_path, "big")
    assert isinstance(found, Reading) and len(found.value) == files.MAX_FILE_BYTES


def test_recording_and_showing_import_nothing_heavy() -> None:
    script = (
        "import sys; from agent import cli; cli.main(['info', '--replay', sys.argv[1]]); "
        "from hwprofiles import record; record.take(); "
        "print('IMPORTED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(PI)], capture_output=True, text=True, check=True)
    imported = done.stdout.partition("IMPORTED")[2].split()
    assert "msgspec" in imported and not {"numpy", "onnxruntime", "torch", "statistics", "models"} & set(imported)
