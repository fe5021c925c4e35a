"""Make an offline bundle: all that a board needs to install edgelam without network.

    make bundle BUNDLE='--python 3.11 --machine aarch64'      (Raspberry Pi OS bookworm)
    scp -r dist/edgelam-0.1.0-agent-cp311-aarch64 pi:bundle && ssh pi sudo bundle/install.sh --offline bundle

The bundle holds the project's wheel, every wheel that it needs on that Python and machine, install.sh, the units and
SHA256SUMS, which install.sh checks. Nothing is built but the project itself, which is pure Python.
"""

from __future__ import annotations

import argparse
import email.parser
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("wire", "hwprofiles", "models", "agent", "coordinator", "testbed")
NEWEST_GLIBC = 35
"""Ubuntu 22.04 and JetPack 6 have glibc 2.35: the oldest systems with a Python that we support."""


def target_environment(python: str, machine: str) -> dict[str, str]:
    """The marker environment of the board; pip itself would take the one of the Python that runs it."""
    environment = {key: str(value) for key, value in default_environment().items()}
    environment.update(
        python_version=python, python_full_version=f"{python}.0", platform_machine=machine, sys_platform="linux"
    )
    return environment


def applies(requirement: Requirement, environment: dict[str, str], extras: Iterable[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras))


def needs_of(wheel: Path, environment: dict[str, str], extras: Iterable[str]) -> Iterator[Requirement]:
    """What a wheel's metadata asks for in `environment`, with the extras asked of it."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode("utf-8"))
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if applies(requirement, environment, extras):
            yield requirement


def build_project(folder: Path) -> Path:
    """Build the project's wheel from a copy of its sources, so that the clone stays clean."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in SOURCES:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy / name)
        pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(copy))
    return next(folder.glob("edgelam-*.whl"))


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def platforms(machine: str) -> list[str]:
    """pip's arguments for wheels that run on `machine` with a glibc of our boards."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(NEWEST_GLIBC, 16, -1)] + [f"manylinux2014_{machine}"]
    if machine == "x86_64":
        tags += [f"manylinux_2_12_{machine}", f"manylinux2010_{machine}", f"manylinux_2_5_{machine}"]
    return [argument for tag in tags for argument in ("--platform", tag)]


def fetch(wanted: list[str], folder: Path, python: str, machine: str, constraints: Path) -> None:
    """Fetch wheels of exactly the `wanted` requirements; what they need in turn is asked for by the caller."""
    pip(
        "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), "--constraint", str(constraints),
        "--implementation", "cp", "--python-version", python, *platforms(machine), *wanted,
    )  # fmt: skip


def close_over(folder: Path, extra: str, python: str, machine: str) -> None:
    """Fetch wheels until every requirement of every wheel in `folder` is met there."""
    environment = target_environment(python, machine)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
        constraints.writelines(f"{pin.name}{pin.specifier}\n" for pin in pins if applies(pin, environment, ()))
        constraints.flush()
        extras: dict[str, set[str]] = {canonicalize_name("edgelam"): {extra} if extra else set()}
        while True:
            held = {parse_wheel_filename(wheel.name)[0]: wheel for wheel in folder.glob("*.whl")}
            missing: dict[str, str] = {}
            for name, wheel in held.items():
                for need in needs_of(wheel, environment, extras.get(name, ())):
                    needed = canonicalize_name(need.name)
                    extras.setdefault(needed, set()).update(need.extras)
                    if needed not in held:
                        missing[needed] = f"{need.name}{need.specifier}"
            if not missing:
                return
            fetch(sorted(missing.values()), folder, python, machine, Path(constraints.name))


def write_sums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def main() -> int:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser = argparse.ArgumentParser(description="Make an offline bundle of edgelam for a board.")
    parser.add_argument("--python", default=here, choices=("3.10", "3.11", "3.12", "3.13"), help="Python of the board")
    parser.add_argument("--machine", default=platform.machine(), choices=("x86_64", "aarch64"))
    parser.add_argument("--role", default="agent", choices=("agent", "coordinator"))
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder to make the bundle in")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out, prefix=".bundle-") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir(mode=0o755)
        project = build_project(folder)
        extra = "coordinator" if given.role == "coordinator" else ""
        close_over(folder, extra, given.python, given.machine)
        shutil.copy(ROOT / "install.sh", folder)
        shutil.copytree(ROOT / "systemd", folder / "systemd")
        write_sums(folder)
        version = parse_wheel_filename(project.name)[1]
        tag = f"cp{given.python.replace('.', '')}-{given.machine}"
        finished: Path = given.out / f"edgelam-{version}-{given.role}-{tag}"
        shutil.rmtree(finished, ignore_errors=True)
        folder.rename(finished)
    print(finished)
    return 0


if __name__ == "__main__":
    sys.exit(main())
