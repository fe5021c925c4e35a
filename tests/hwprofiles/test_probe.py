"""Readers of recorded and made-up trees: what is there is read, what is not is absent, what is broken has failed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwprofiles.probe import clocks, commands, engines, files, jetson, limits, network, nvidia, proc, thermal
from hwprofiles.reading import Absent, Failed, Reading

FIXTURES = Path(__file__).parent / "fixtures"
GUEST = FIXTURES / "captured-x86-guest-cgroup-v1"
PI = FIXTURES / "made-by-hand-raspberry-pi-5-unit-cgroup-v2"
JETSON = FIXTURES / "made-by-hand-jetson"
ORIN = FIXTURES / "captured-jetson-orin-nano-super-l4t"
CONTAINER = FIXTURES / "made-by-hand-container-cgroup-v1-nested"


def put(root: Path, relative: str, text: str) -> None:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def value(found: Any) -> Any:
    assert isinstance(found, Reading), found
    return found.value


def test_every_fixture_says_where_it_comes_from() -> None:
    for folder in FIXTURES.iterdir():
        source = (folder / "SOURCE").read_text()
        if folder.name.startswith("captured"):
            assert "licence" in source.lower()
        else:
            assert folder.name.startswith("made-by-hand") and "not a capture" in source


# files and commands


def test_source_is_named_as_the_board_names_it() -> None:
    assert files.text(PI, "proc/loadavg") == Reading("0.10 0.20 0.30 1/200 4242", "/proc/loadavg")


def test_missing_unreadable_and_senseless_files_are_three_things(tmp_path: Path) -> None:
    put(tmp_path, "word", "four")
    assert files.parsed(tmp_path, "none", int) == Absent("no /none")
    assert files.parsed(tmp_path, "word/deeper", int) == Absent("no /word/deeper")
    (tmp_path / "folder").mkdir()
    assert files.text(tmp_path, "folder") == Failed("EISDIR /folder")
    assert files.parsed(tmp_path, "word", int) == Failed("/word holds 'four'")


@given(st.sets(st.integers(0, 200), min_size=1))
def test_processor_lists_are_read_as_the_kernel_writes_them(numbers: set[int]) -> None:
    assert files.number_list(",".join(map(str, sorted(numbers)))) == tuple(sorted(numbers))


def test_processor_ranges() -> None:
    assert files.number_list("0-2,5,7-8\n") == (0, 1, 2, 5, 7, 8)
    for bad in ("x", "3-1", "-1", "0-4000000000"):
        with pytest.raises(ValueError):
            files.number_list(bad)


def test_live_commands_answer_fail_and_are_absent() -> None:
    assert commands.live(("echo", "hello")) == Reading("hello", "echo hello")
    assert commands.live(("no-such-program-here",)) == Absent("no program no-such-program-here")
    assert commands.live(("sh", "-c", "echo oops >&2; exit 3")) == Failed("sh -c echo oops >&2; exit 3: exit 3: oops")


def test_command_that_hangs_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "COMMAND_DEADLINE_S", 0.05)
    found = commands.live(("sleep", "5"))
    assert isinstance(found, Failed) and "no answer within" in found.because


def test_recorded_tree_never_runs_a_program() -> None:
    run = commands.runner_for(PI)
    assert run(("vcgencmd", "get_throttled")) == Reading("throttled=0x50005", "vcgencmd get_throttled")
    assert run(("echo", "hello")) == Absent("echo hello was not recorded")
    assert commands.runner_for(Path("/")) is commands.live


# proc


def test_identity_of_a_raspberry_pi() -> None:
    assert value(proc.board(PI)) == "Raspberry Pi 5 Model B Rev 1.0"
    assert value(proc.cpu_model(PI)) == "Cortex-A76 (0x41/0xd0b)"
    assert value(proc.distribution(PI)) == "Debian GNU/Linux 13 (trixie)"
    assert proc.arch(PI) == "aarch64"
    assert value(proc.memory(PI)) == (8244736 * 1024, 7000000 * 1024)
    assert value(proc.load(PI)) == 0.1


def test_identity_of_a_virtual_machine_without_a_name() -> None:
    assert isinstance(proc.board(GUEST), Absent)
    assert value(proc.cpu_model(GUEST)) == "AMD EPYC"
    assert isinstance(proc.kernel(GUEST), Absent)
    assert value(proc.affinity(GUEST)) == value(proc.online_cores(GUEST)) == (0, 1)


def test_board_by_dmi_without_what_vendors_leave_empty(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/dmi/id/sys_vendor", "Intel(R) Client Systems\n")
    put(tmp_path, "sys/class/dmi/id/product_name", "To Be Filled By O.E.M.\n")
    assert value(proc.board(tmp_path)) == "Intel(R) Client Systems"


def test_unknown_arm_core_and_big_little(tmp_path: Path) -> None:
    put(
        tmp_path,
        "proc/cpuinfo",
        "CPU implementer : 0x41\nCPU part\t: 0xd05\nCPU implementer : 0x99\nCPU part\t: 0x001\n",
    )
    assert value(proc.cpu_model(tmp_path)) == "Cortex-A55 (0x41/0xd05) + ARM core (0x99/0x001)"


@pytest.mark.parametrize(
    "read", [proc.cpu_model, proc.memory, proc.load, proc.distribution, proc.affinity, proc.online_cores]
)
def test_empty_proc_files_are_failed_not_zero(tmp_path: Path, read: Any) -> None:
    assert isinstance(read(tmp_path), Absent)
    for name in ("proc/cpuinfo", "proc/meminfo", "proc/loadavg", "etc/os-release", "proc/self/status"):
        put(tmp_path, name, "")
    put(tmp_path, "sys/devices/system/cpu/online", "\n")
    assert isinstance(read(tmp_path), Failed)


# limits


def test_captured_v1_tree_without_limits() -> None:
    assert limits.memory_limit(GUEST) == Absent("no control group limits memory")
    assert isinstance(limits.processor_quota(GUEST), Absent)
    assert value(limits.processor_set(GUEST)) == (0, 1)


def test_tightest_v1_limit_wins_from_own_group_parent_or_above_the_container() -> None:
    assert value(limits.memory_limit(CONTAINER)) == 1 << 30
    quota = limits.processor_quota(CONTAINER)
    assert quota == Reading(limits.Quota(0.25, 0.01), "/sys/fs/cgroup/cpu,cpuacct/board1/cpu.cfs_quota_us")
    assert value(limits.processor_set(CONTAINER)) == (1, 2, 7)


def test_tightest_v2_limit_wins_with_memory_high_and_a_quota_of_the_slice() -> None:
    limit, quota = limits.memory_limit(PI), limits.processor_quota(PI)
    unit = "/sys/fs/cgroup/system.slice/edgelam-agent.service"
    assert limit == Reading(3 << 30, f"{unit}/memory.high")
    assert quota == Reading(limits.Quota(1.5, 0.1), "/sys/fs/cgroup/system.slice/cpu.max")
    assert value(limits.processor_set(PI)) == (0, 1, 2, 3)


def v2(root: Path, group: str = "/a/b", mount_root: str = "/", controllers: str = "cpu memory") -> None:
    put(root, "proc/self/cgroup", f"0::{group}\n")
    put(root, "proc/self/mountinfo", f"36 25 0:32 {mount_root} /sys/fs/cgroup rw shared:9 master:1 - cgroup2 c rw\n")
    put(root, "sys/fs/cgroup/cgroup.controllers", controllers)


def test_limit_of_a_parent_group_holds(tmp_path: Path) -> None:
    v2(tmp_path)
    put(tmp_path, "sys/fs/cgroup/a/memory.max", "1000\n")
    put(tmp_path, "sys/fs/cgroup/a/b/memory.max", "2000\n")
    assert limits.memory_limit(tmp_path) == Reading(1000, "/sys/fs/cgroup/a/memory.max")


@pytest.mark.parametrize(("group", "mount_root"), [("/", "/"), ("/../elsewhere", "/"), ("/docker/x", "/other/y")])
def test_container_whose_own_group_is_its_mount(tmp_path: Path, group: str, mount_root: str) -> None:
    v2(tmp_path, group, mount_root)
    put(tmp_path, "sys/fs/cgroup/memory.max", "5000\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "2500 10000\n")
    assert value(limits.memory_limit(tmp_path)) == 5000
    assert value(limits.processor_quota(tmp_path)) == limits.Quota(0.25, 0.01)


def test_memory_groups_that_are_off_are_told_with_the_remedy(tmp_path: Path) -> None:
    v2(tmp_path, controllers="cpuset cpu io pids")
    found = limits.memory_limit(tmp_path)
    assert isinstance(found, Absent) and "cgroup_enable=memory" in found.because


def test_system_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert isinstance(limits.memory_limit(tmp_path), Absent)
    assert isinstance(limits.processor_quota(tmp_path), Absent)
    assert isinstance(limits.processor_set(tmp_path), Absent)


@pytest.mark.parametrize("text", ["x 10000", "100", "0 10000", "5 0", "-1 10000"])
def test_senseless_quota_has_failed(tmp_path: Path, text: str) -> None:
    v2(tmp_path)
    put(tmp_path, "sys/fs/cgroup/a/b/cpu.max", text)
    assert isinstance(limits.processor_quota(tmp_path), Failed)


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_group_files_give_an_answer(cgroup: str, mountinfo: str) -> None:
    list(limits._group_paths(cgroup))
    list(limits._mounts(mountinfo))
    list(limits._mounts(f"1 2 3 / /x rw - cgroup2 {mountinfo}"))


# clocks and heat


def test_clocks_and_governors() -> None:
    assert value(clocks.governor(PI)) == "ondemand"
    assert value(clocks.clocks(PI)) == clocks.Clocks(2.4e9, 1.5e9, 2.4e9)
    assert value(clocks.governor(JETSON)) == "schedutil, performance"
    assert value(clocks.clocks(JETSON)).current_hz == 1.5104e9
    assert isinstance(clocks.clocks(GUEST), Absent) and isinstance(clocks.governor(GUEST), Absent)


def test_hottest_zone_leaves_out_sensors_that_are_off_or_fake() -> None:
    assert thermal.hottest(JETSON) == Reading(56.656, "thermal_zone3 tj-thermal")
    by_kind = {zone.kind: zone.celsius for zone in thermal.zones(JETSON)}
    assert isinstance(by_kind["gpu-thermal"], Absent) and isinstance(by_kind["PMIC-Die"], Absent)
    assert thermal.hottest(GUEST) == Absent("no thermal zones")


def test_impossible_temperature_has_failed_and_a_board_with_nothing_but_dead_sensors_has_none(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/thermal/thermal_zone0/type", "cpu")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "4294967295")
    assert isinstance(thermal.hottest(tmp_path), Failed)
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "-256000")
    assert isinstance(thermal.hottest(tmp_path), Absent)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (0x0, "0x0: none"),
        (0x50005, "0x50005: under-voltage now, throttled now, under-voltage since boot, throttled since boot"),
        (
            0xA0002,
            "0xa0002: frequency capped now, frequency capped since boot, soft temperature limit since boot",
        ),
        (
            0xE0008,
            "0xe0008: soft temperature limit now, frequency capped since boot, throttled since boot, "
            "soft temperature limit since boot",
        ),
    ],
)
def test_throttle_words_of_the_raspberry_pi(word: int, text: str) -> None:
    assert thermal.throttle_words(word) == text


def test_throttle_word_is_hexadecimal_however_it_is_written() -> None:
    assert [thermal.parse_throttle_word(text) for text in ("throttled=0x50005", "0x50005", "50005\n")] == [0x50005] * 3


def test_throttle_by_vcgencmd_by_sysfs_and_by_alerts(tmp_path: Path) -> None:
    run = commands.runner_for(PI)
    assert value(thermal.throttle(PI, run)).startswith("0x50005: under-voltage now")
    assert thermal.throttle(JETSON, commands.runner_for(JETSON)) == Reading("gpu throttled now", "throttle alerts")
    put(tmp_path, "sys/devices/platform/soc@107c000000/x-firmware/get_throttled", "0\n")
    assert value(thermal.throttle(tmp_path, run)) == "0x0: none"


def test_no_source_about_throttling_is_absent_not_none() -> None:
    assert isinstance(thermal.throttle(GUEST, commands.runner_for(GUEST)), Absent)


def test_vcgencmd_is_asked_only_on_a_raspberry_pi() -> None:
    def forbidden(command: tuple[str, ...]) -> Failed:
        raise AssertionError(command)

    thermal.throttle(GUEST, forbidden)


# jetson, nvidia, network, engines


def test_l4t_release_of_the_captured_board() -> None:
    assert value(jetson.l4t_release(ORIN)) == "R36.4.3"
    assert isinstance(jetson.module(ORIN), Absent)
    assert isinstance(jetson.l4t_release(PI), Absent)


def test_jetson_module_by_its_compatible_names() -> None:
    assert value(jetson.module(JETSON)) == ("p3767-0005", "tegra234", "Orin NX or Orin Nano")
    assert isinstance(jetson.module(PI), Absent)


class FakeNvml(SimpleNamespace):
    """What pynvml looks like to us."""

    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, init: Exception | None = None, memory: Exception | None = None) -> None:
        super().__init__(init=init, memory=memory, shut=0)

    def nvmlInit(self) -> None:
        if self.init:
            raise self.init

    def nvmlShutdown(self) -> None:
        self.shut += 1

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"Orin"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        if self.memory:
            raise self.memory
        return SimpleNamespace(total=8 << 30, free=6 << 30)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "540.4.0"

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        return {0: 1020, 2: 3199}[clock]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        raise self.NVMLError("GPU is lost")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return 0x25


def with_driver(root: Path) -> Path:
    put(root, "dev/nvidiactl", "")
    return root


def test_gpu_fields_are_absent_one_by_one(tmp_path: Path) -> None:
    nvml = FakeNvml(memory=FakeNvml.NVMLError_NotSupported())
    (gpu,) = value(nvidia.gpus(with_driver(tmp_path), nvml))
    assert gpu.name == Reading("Orin", "NVML") and isinstance(gpu.memory_bytes, Absent)
    assert nvml.shut == 1
    (gpu,) = value(nvidia.gpus(tmp_path, FakeNvml()))
    assert (value(gpu.memory_bytes), value(gpu.memory_free_bytes)) == (8 << 30, 6 << 30)
    assert (value(gpu.clock_hz), value(gpu.memory_clock_hz)) == (1.02e9, 3.199e9)
    assert gpu.watts == Failed("NVML: GPU is lost")
    assert isinstance(gpu.celsius, Absent) and "no nvmlDeviceGetTemperature" in gpu.celsius.because
    assert (value(gpu.throttle), value(gpu.driver)) == ("power limit now, thermal limit now", "540.4.0")


def test_recorded_answers_of_nvml_are_replayed_and_damaged_ones_have_failed(tmp_path: Path) -> None:
    with_driver(tmp_path)
    live = nvidia.gpus(tmp_path, FakeNvml())
    (tmp_path / nvidia.RECORDED).write_bytes(msgspec.json.encode(live))
    assert nvidia.gpus(tmp_path) == live
    put(tmp_path, nvidia.RECORDED, "[1")
    assert isinstance(nvidia.gpus(tmp_path), Failed)


def test_driver_without_the_package_that_asks_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(nvidia, "DRIVER_TRACES", ("proc/self/status",))
    assert nvidia.gpus(Path("/")) == Absent("a driver, but no nvidia-ml-py to ask it")


def test_no_driver_no_library_and_a_broken_driver_are_told_apart(tmp_path: Path) -> None:
    assert nvidia.gpus(GUEST) == Absent("no NVIDIA driver")
    with_driver(tmp_path)
    assert nvidia.gpus(tmp_path) == Absent("NVML was not recorded")
    assert isinstance(nvidia.gpus(tmp_path, FakeNvml(FakeNvml.NVMLError_LibraryNotFound())), Absent)
    assert isinstance(nvidia.gpus(tmp_path, FakeNvml(FakeNvml.NVMLError("Driver/library version mismatch"))), Failed)


def test_interfaces_of_a_recorded_tree_have_speeds_and_no_addresses() -> None:
    found = {interface.name: interface for interface in network.interfaces(PI)}
    assert list(found) == ["eth0", "wlan0"]
    assert value(found["eth0"].link_bits_per_s) == 1e9 and not found["eth0"].wireless
    assert isinstance(found["wlan0"].link_bits_per_s, Absent) and found["wlan0"].wireless
    assert found["eth0"].addresses == ()


def test_live_interfaces_without_an_address_and_loopback_are_left_out() -> None:
    import socket

    known = {
        "lo": [(int(socket.AF_INET), "127.0.0.1")],
        "eth9": [(int(socket.AF_INET), "10.0.0.7"), (int(socket.AF_PACKET), "aa:bb")],
        "down0": [(int(socket.AF_PACKET), "cc:dd")],
    }
    (found,) = network.interfaces(Path("/"), lambda: known)
    assert (found.name, found.addresses) == ("eth9", ("10.0.0.7",))


def test_engines_by_their_folders(tmp_path: Path) -> None:
    for name in ("onnxruntime_gpu-1.23.2.dist-info", "tensorrt-10.3.0-py3.10.egg-info", "torchvision-1.0.dist-info"):
        (tmp_path / name).mkdir()
    installed = {"onnxruntime": "/x/onnxruntime", "tensorrt": "/x/tensorrt"}
    found = engines.engines([str(tmp_path), "/nowhere", str(tmp_path / "a.zip")], installed.get)
    assert found == {
        "onnxruntime": Reading("1.23.2", "/x/onnxruntime"),
        "torch": Absent("torch is not installed"),
        "tensorrt": Reading("10.3.0", "/x/tensorrt"),
    }


def test_engine_without_a_distribution_and_one_that_cannot_be_found() -> None:
    def find(name: str) -> str | None:
        if name == "torch":
            raise ValueError("torch.__spec__ is None")
        return "/x" if name == "onnxruntime" else None

    found = engines.engines([], find)
    assert found["onnxruntime"] == Reading("of unknown version", "/x")
    assert found["torch"] == Failed("torch: torch.__spec__ is None")


def test_installed_engines_are_found_without_importing_them() -> None:
    before = set(sys.modules)
    found = engines.engines()
    assert isinstance(found["onnxruntime"], Reading) and found["onnxruntime"].value[0].isdigit()
    assert not {"onnxruntime", "torch", "tensorrt"} & (set(sys.modules) - before)
