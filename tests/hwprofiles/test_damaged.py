"""Recordings come from elsewhere: whatever stands in their files, readers answer and raise nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hwprofiles import plain, record, sensors
from hwprofiles.sampler import Sampler
from tests.hwprofiles.test_probe import CONTAINER, JETSON, ORIN, PI, put
from tests.hwprofiles.test_sensors import PMIC, hwmon, package

NONSENSE = st.sampled_from(
    [
        b"",
        b"\0",
        b"-1",
        b"9" * 400 + b" 1",
        b"1 2 3 / cgroup rw - cgroup2 c cpu,memory",
        b"MemTotal: " + b"9" * 400 + b" kB",
        b"nan",
        b"9" * 400,
        b"9" * 5000,
        b"1e999",
        b"0x",
        b"{",
        b"[[[",
        b"\xff\xfe",
        b"- - - - - - - - - - x",
    ]
)


def board(folder: Path) -> Path:
    """A tree that has something for every reader."""
    for root in (CONTAINER, JETSON, ORIN, PI):
        shutil.copytree(root, folder, dirs_exist_ok=True)
    hwmon(folder, "1-0040", ("VDD_IN", 5000, 1000), ("VDD_SOC", 5000, 100))
    package(folder, "intel-rapl:0", "package-0", 5)
    for name in ("cur_freq", "min_freq", "max_freq", "device/load"):
        put(folder, f"sys/class/devfreq/17000000.gpu/{name}", "500")
    for name, text in {"name": "rpi_volt", "in0_lcrit_alarm": "0"}.items():
        put(folder, f"sys/class/hwmon/hwmon0/{name}", text)
    put(folder, "commands/vcgencmd-pmic_read_adc.txt", PMIC)
    put(folder, "commands/nvpmodel--p---verbose.txt", "POWER_MODEL ID=0 NAME=15W")
    put(folder, "dev/nvidiactl", "")
    put(folder, "nvml.json", "{}")
    put(folder, "engines.json", "{}")
    return folder


_TREE = Path(tempfile.mkdtemp(prefix="edgelam-test-"))
"""Removed below, once its names are known."""
FILES = sorted(str(path.relative_to(_TREE)) for path in board(_TREE).rglob("*") if path.is_file())
shutil.rmtree(_TREE)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(FILES), NONSENSE | st.binary(max_size=60), max_size=12))
def test_damaged_recording_is_read_shown_and_sampled(damage: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = board(Path(folder))
        for path, data in damage.items():
            (root / path).write_bytes(data)
        found = record.read(root)
        plain.named(found)
        assert sensors.survey_lines(found.survey) and sensors.lines(found.board)
        assert sensors.condition_lines(found.conditions)
        sampler = Sampler(root=root)
        sampler.sample()
        assert len(sampler.trace().samples) == 1


def test_every_single_file_may_be_nonsense(tmp_path: Path) -> None:
    root = board(tmp_path)
    for path in FILES:
        kept = (root / path).read_bytes()
        for data in (b"", b"9" * 400, b"9" * 400 + b" 1", b"1 2 3 / cgroup rw - cgroup2 c memory", b"\xff" * 9):
            (root / path).write_bytes(data)
            assert record.read(root).survey.cores.online >= 1, f"{path}: {data[:20]!r}"
        (root / path).write_bytes(kept)
