"""install.sh on a machine of shims: plan before deed, twice is once, and back without a trace."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.install.fake_machine import REPOSITORY, FakeMachine

CHANGES = ("useradd", "usermod", "userdel", "groupdel", "chown", "python3 -m", "systemctl enable", "systemctl restart")


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def changed(output: str) -> int:
    """How many steps the installer says it changed."""
    (line,) = (line for line in output.splitlines() if line.startswith("done: "))
    return int(line.split()[1])


def test_installs_a_release_settings_and_a_running_unit(machine: FakeMachine) -> None:
    done = machine.run("--site", "lab", "--broker", "mqtt://10.0.0.5:8570", "--name", "pi5")
    assert done.returncode == 0, done.stderr
    files = machine.files()
    assert (
        files["etc/systemd/system/edgelam-agent.service"] == (REPOSITORY / "systemd/edgelam-agent.service").read_text()
    )
    assert files["usr/local/bin/edgelam-agent"] == "-> /opt/edgelam/current/bin/edgelam-agent"
    settings = files["etc/edgelam/agent.env"].splitlines()
    assert settings[1:] == ["EDGELAM_SITE=lab", "EDGELAM_BROKER=mqtt://10.0.0.5:8570", "EDGELAM_NAME=pi5"]
    assert f"-> {machine.active_release()}" == files["opt/edgelam/current"]


def test_a_second_run_changes_nothing(machine: FakeMachine) -> None:
    machine.run("--site", "lab", "--site-key", "-", given="secret\n")
    before = machine.files()
    again = machine.run("--site", "lab", "--site-key", "-", given="secret\n")
    assert changed(again.stdout) == 0
    log = "var/log/edgelam-install.log"
    assert {**machine.files(), log: ""} == {**before, log: ""}


def test_a_second_run_without_options_keeps_the_settings(machine: FakeMachine) -> None:
    machine.run("--site", "lab", "--name", "pi5")
    assert changed(machine.run().stdout) == 0
    machine.run("--name", "pi6")
    assert machine.files()["etc/edgelam/agent.env"].splitlines()[1:] == ["EDGELAM_SITE=lab", "EDGELAM_NAME=pi6"]


def test_dry_run_tells_the_steps_and_changes_nothing(machine: FakeMachine) -> None:
    before = machine.files()
    planned = machine.run("--dry-run", "--site", "lab")
    assert planned.returncode == 0, planned.stderr
    assert machine.files() == before
    assert not [call for call in machine.calls() if call.startswith(CHANGES)]
    steps = [line.removeprefix("would").strip() for line in planned.stdout.splitlines() if line.startswith("would")]
    done = machine.run("--site", "lab")
    assert steps == [
        line.removeprefix("changed").strip() for line in done.stdout.splitlines() if line.startswith("changed")
    ]


def test_a_truncated_copy_runs_nothing(machine: FakeMachine, tmp_path: Path) -> None:
    text = (REPOSITORY / "install.sh").read_text()
    before = machine.files()
    cut = tmp_path / "cut.sh"
    lines = text.splitlines(keepends=True)
    last = sum(map(len, lines[:-1]))
    # Every line from the first step on, and every byte of the last line.
    ends = [sum(map(len, lines[:number])) for number in range(1, len(lines), 7)] + list(range(last, len(text) - 2))
    for end in ends:
        cut.write_text(text[:end])
        machine.run("--site", "lab", script=cut)
    assert machine.files() == before
    assert machine.calls() == []


def test_the_site_key_is_kept_from_others_and_from_every_command_line(machine: FakeMachine) -> None:
    machine.run("--site-key", "-", given="open-sesame\n")
    key = machine.root / "etc/edgelam/site.key"
    assert key.read_text() == "open-sesame\n"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "EDGELAM_SITE_KEY_FILE=/etc/edgelam/site.key" in machine.files()["etc/edgelam/agent.env"]
    assert not [call for call in machine.calls() if "open-sesame" in call]
    assert "open-sesame" not in (machine.root / "var/log/edgelam-install.log").read_text()


def test_uninstall_keeps_settings_and_purge_leaves_nothing(machine: FakeMachine) -> None:
    before = machine.files()
    machine.run("--site", "lab", "--site-key", "-", given="secret\n")
    removed = machine.run("--uninstall")
    assert removed.returncode == 0, removed.stderr
    assert machine.active_release() == ""
    assert not (machine.root / "opt/edgelam").exists()
    assert "EDGELAM_SITE=lab" in machine.files()["etc/edgelam/agent.env"]
    assert (machine.fake / "passwd.edgelam").exists()

    assert machine.run("--uninstall", "--purge").returncode == 0
    left = {name for name, text in machine.files().items() if text != "folder"}
    assert left == {name for name, text in before.items() if text != "folder"}
    assert not (machine.root / "etc/edgelam").exists()
    assert not (machine.fake / "passwd.edgelam").exists()


def test_uninstall_where_nothing_is_installed_changes_nothing(machine: FakeMachine) -> None:
    assert changed(machine.run("--uninstall", "--purge").stdout) == 0


def test_an_upgrade_keeps_the_release_before_and_a_broken_one_is_taken_back(
    machine: FakeMachine, tmp_path: Path
) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(REPOSITORY, newer, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "dist", "build"))
    machine.run()
    first = machine.active_release()
    version = newer / "wire" / "version.py"
    version.write_text(version.read_text().replace('VERSION = "', 'VERSION = "99.'))
    assert machine.run(script=newer / "install.sh").returncode == 0
    second = machine.active_release()
    assert second != first
    assert (machine.root / "opt/edgelam" / first).is_dir()

    version.write_text(version.read_text().replace('VERSION = "99.', 'VERSION = "98.'))
    failed = machine.run(script=newer / "install.sh", FAKE_BROKEN="98.")
    assert failed.returncode == 1
    assert f"{second} is active again" in failed.stderr
    assert machine.active_release() == second


def test_a_run_that_was_cut_off_before_the_restart_is_made_good(machine: FakeMachine, tmp_path: Path) -> None:
    machine.run()
    first = machine.active_release()
    newer = tmp_path / "newer"
    shutil.copytree(REPOSITORY, newer, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "dist", "build"))
    with (newer / "wire" / "version.py").open("a") as version:
        version.write("\n# another build\n")
    cut = (newer / "install.sh").read_text().replace('step "running"', 'kill -9 $$; step "running"')
    (newer / "cut.sh").write_text(cut)
    assert machine.run(script=newer / "cut.sh").returncode == -9
    assert machine.active_release() == first
    assert machine.run(script=newer / "install.sh").returncode == 0
    assert machine.active_release() not in ("", first)


def test_a_failing_command_is_named_with_its_code_its_last_words_and_a_way_on(machine: FakeMachine) -> None:
    failed = machine.run(FAKE_PIP_FAILS="yes")
    assert failed.returncode == 1
    for expected in (
        "failed at: release",
        "-m pip install",
        "exit code: 1",
        "no matching distribution for numpy",
        str(machine.root / "var/log/edgelam-install.log"),
        "try: check the network",
    ):
        assert expected in failed.stderr
    assert machine.run().returncode == 0


def test_a_role_added_without_a_service_leaves_the_other_ones_program_whole(machine: FakeMachine) -> None:
    machine.run("--role", "coordinator", "--no-service")
    before = machine.files()["opt/edgelam/current"]
    machine.run("--role", "agent", "--no-service")
    assert machine.files()["opt/edgelam/current"] == before
    assert before.endswith("-coordinator")


def test_both_roles_share_one_release_and_leave_one_by_one(machine: FakeMachine) -> None:
    machine.run("--role", "agent")
    both = machine.run("--role", "coordinator", "--site", "lab")
    assert both.returncode == 0, both.stderr
    assert machine.active_release("edgelam-coordinator.service").endswith("-coordinator")
    assert changed(machine.run("--role", "agent").stdout) == 0
    assert "the role agent needs them" in machine.run("--role", "coordinator", "--uninstall", "--purge").stdout
    assert (machine.root / "opt/edgelam/current/bin/edgelam-agent").exists()


def test_a_jetson_sees_the_systems_packages_and_gets_its_devices(machine: FakeMachine) -> None:
    (machine.root / "etc").mkdir(exist_ok=True)
    (machine.root / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.0\n")
    done = machine.run(FAKE_MACHINE="aarch64")
    assert done.returncode == 0, done.stderr
    assert [call for call in machine.calls() if "-m venv --system-site-packages" in call]
    assert "etc/systemd/system/edgelam-agent.service.d/jetson.conf" in machine.files()
    assert "never pip install tensorrt" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "settings", "expected", "code"),
    [
        ((), {"FAKE_MACHINE": "armv7l"}, "armv7l is not supported", 3),
        ((), {"FAKE_MINOR": "9"}, "no Python 3.10 to 3.13", 3),
        ((), {"FAKE_NO_VENV": "yes"}, "try: sudo apt install python3.11-venv", 3),
        (("--site", "Bad Name"), {}, "'Bad Name' is not a name", 2),
        (("--broker", "mqtt://x\nEVIL=1"), {}, "is not a broker's address", 2),
        (("--frobnicate",), {}, "unknown option --frobnicate", 2),
        (("--site",), {}, "--site needs a value", 2),
        (("--purge",), {}, "--purge goes with --uninstall", 2),
        (("--offline", "/nowhere"), {}, "no folder /nowhere", 2),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_touched(
    machine: FakeMachine, arguments: tuple[str, ...], settings: dict[str, str], expected: str, code: int
) -> None:
    refused = machine.run(*arguments, **settings)
    assert expected in refused.stderr
    assert refused.returncode == code
    assert not (machine.root / "opt").exists()
    assert not (machine.root / "etc").exists()


def test_without_systemd_it_offers_to_install_the_programs_only(machine: FakeMachine) -> None:
    (machine.root / "run/systemd/system").rmdir()
    refused = machine.run()
    assert refused.returncode == 3 and "try: ./install.sh --no-service" in refused.stderr
    assert machine.run("--no-service").returncode == 0
    assert changed(machine.run("--no-service").stdout) == 0
    assert not [call for call in machine.calls() if call.startswith("systemctl")]


def test_a_dry_run_without_systemd_tells_the_steps_and_that_they_need_it(machine: FakeMachine) -> None:
    with_it = machine.run("--dry-run").stdout
    (machine.root / "run/systemd/system").rmdir()
    before = machine.files()
    planned = machine.run("--dry-run")
    assert (planned.returncode, planned.stderr) == (0, "")
    [note] = set(planned.stdout.splitlines()) - set(with_it.splitlines())
    assert "systemd does not run here" in note and "--no-service" in note
    assert "starts at boot" in planned.stdout and machine.files() == before
    assert "note" not in machine.run("--dry-run", "--no-service").stdout


def test_a_damaged_bundle_is_refused(machine: FakeMachine, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    wheel = bundle / "edgelam-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"as made")
    sums = subprocess.run(["sha256sum", wheel.name], cwd=bundle, capture_output=True, text=True, check=True).stdout
    (bundle / "SHA256SUMS").write_text(sums)
    assert machine.run("--offline", str(bundle)).returncode == 0
    wheel.write_bytes(b"as damaged")
    refused = machine.run("--offline", str(bundle))
    assert "does not match its SHA256SUMS" in refused.stderr
