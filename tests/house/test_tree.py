"""Rules that hold for the whole tree: what no file may contain, what no module may import, how big a room may be."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("wire", "hwprofiles", "models", "agent", "coordinator", "testbed")

MOST_LINES = 600
"""A file beyond this has more than one public idea."""

BASE_MODULES = {"msgspec", "numpy", "onnxruntime", "paho", "psutil", "pynvml", "zeroconf"}
"""Import names of `dependencies` in pyproject.toml: what a board has."""

ON_EVERY_BOARD = ("wire", "hwprofiles", "agent", "models/engine", "models/sampling.py")
"""What must work there, and so may import nothing else at import time."""

ALLOWED_ELSEWHERE = {
    "wire/embedded.py": {"amqtt"},
    "models/engine/torch.py": {"torch"},
    "models/training/computer.py": {"torch"},
    "models/training/connectors.py": {"torch"},
    "models/training/encoder.py": {"torch"},
    "models/training/factored.py": {"torch"},
    "models/training/heads.py": {"torch"},
    "models/training/llama.py": {"torch"},
    "models/training/lowrank.py": {"torch"},
    "models/training/looped.py": {"torch"},
    "models/training/looping.py": {"torch"},
    "models/training/private.py": {"torch"},
    "models/training/privateends.py": {"torch"},
    "models/training/rounds.py": {"torch"},
    "models/training/split.py": {"torch"},
    "models/training/tensors.py": {"torch"},
    "models/training/trunk.py": {"torch"},
    "models/training/samples.py": {"tokenizers"},
    "agent/workers/training.py": {"torch"},
    "agent/workers/roundwork.py": {"torch"},
    "agent/workers/connectedwork.py": {"torch"},
    "agent/workers/answering.py": {"torch"},
    "agent/workers/splitwork.py": {"torch"},
    "agent/workers/endswork.py": {"torch"},
    "agent/workers/trunkwork.py": {"torch"},
    "agent/workers/questions.py": {"torch"},
    "agent/workers/hubwork.py": {"torch"},
    "agent/workers/shardwork.py": {"torch"},
    "agent/workers/securework.py": {"torch", "cryptography"},
    "agent/workers/summed.py": {"cryptography"},
}
"""Files that are imported only where their extra is installed, and by no one at import time (checked below)."""

HEAVY = ("amqtt", "numpy", "onnxruntime", "torch")

LOADS = {
    "agent.cli, agent.service": set(),
    "agent.workers.inference, agent.workers.measuring": {"numpy"},
    "coordinator.cli": {"numpy"},
    "all of wire": {"numpy"},
    **{f"all of {package}": {"numpy", "onnxruntime"} for package in PACKAGES if package != "wire"},
}
"""What is imported in a process of its own -> which heavy packages that may load. The first is the supervisor."""

IMPORT_ALL = """
import importlib, pkgutil
package = importlib.import_module({package!r})
for found in pkgutil.walk_packages(package.__path__, {package!r} + "."):
    if found.name not in {extras!r} and not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        path = REPOSITORY / folder
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imports_at_import_time(path: Path) -> set[str]:
    """Top-level packages that importing `path` imports: not those in functions or under TYPE_CHECKING."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        waiting.extend(ast.iter_child_nodes(node))
    return found


def imports_beyond(folder: str, may: set[str]) -> dict[str, set[str]]:
    """File -> what it imports at import time and may not."""
    strange = {}
    for path in sources(folder):
        beyond = imports_at_import_time(path) - may - ALLOWED_ELSEWHERE.get(name_of(path), set())
        if beyond:
            strange[name_of(path)] = beyond
    return strange


@pytest.mark.parametrize("folder", ON_EVERY_BOARD)
def test_the_base_install_is_enough_for_a_board(folder: str) -> None:
    may = BASE_MODULES | set(PACKAGES) | set(sys.stdlib_module_names)
    assert imports_beyond(folder, may) == {}


def names_of_extra(name: str) -> set[str]:
    """Import names of an extra in pyproject.toml, as far as they follow from the names of its packages; with protobuf,
    which onnx needs."""
    inside = re.search(rf"^{name} = \[(.*?)^\]", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert inside is not None
    return {"google", *(found.replace("-", "_") for found in re.findall(r'^    "([\w-]+)', inside[1], re.MULTILINE))}


@pytest.mark.parametrize("folder", ["coordinator", "models", "testbed"])
def test_the_coordinators_extra_is_enough_for_a_coordinator(folder: str) -> None:
    may = BASE_MODULES | set(PACKAGES) | set(sys.stdlib_module_names) | names_of_extra("coordinator") | {"tomllib"}
    assert imports_beyond(folder, may) == {}


def loaded_by(code: str, folder: Path = REPOSITORY) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded, or tried to load: they need not be installed."""
    watch = """
        import sys
        asked = set()
        class Watch:
            def find_spec(self, name, path=None, target=None):
                asked.add(name.partition(".")[0])
        sys.meta_path.insert(0, Watch())
    """
    tell = f"print('loaded', *sorted(asked & set({HEAVY!r})))"
    whole = "\n".join((textwrap.dedent(watch), code, tell))
    done = subprocess.run([sys.executable, "-c", whole], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("what", LOADS)
def test_what_is_heavy_is_loaded_only_where_it_is_used(what: str) -> None:
    extras = {name.removesuffix(".py").replace("/", ".") for name in ALLOWED_ELSEWHERE}
    code = f"import {what}"
    if what.startswith("all of "):
        code = IMPORT_ALL.format(package=what.removeprefix("all of "), extras=extras)
    assert loaded_by(code) <= LOADS[what]


def test_an_engine_that_is_imported_too_early_is_noticed(tmp_path: Path) -> None:
    package = tmp_path / "models" / "engine"
    shutil.copytree(REPOSITORY / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "wire", tmp_path / "wire", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "torch.py").write_text("import torch")
    (tmp_path / "torch.py").touch()
    assert "torch" not in loaded_by("import models.engine.base", tmp_path)
    (package / "__init__.py").write_text("import models.engine.torch")
    assert "torch" in loaded_by("import models.engine.base", tmp_path)


def test_no_room_is_too_big() -> None:
    big = {
        name_of(path): len(path.read_text().splitlines()) for path in sources(*PACKAGES, "tests", "benchmarks", "tools")
    }
    assert {name: lines for name, lines in big.items() if lines > MOST_LINES} == {}


FORBIDDEN = {
    "QoS 2": r"\bqos\s*=\s*2\b",
    "pickle": r"^\s*(?:import|from) (?:pickle|cloudpickle|dill|joblib)\b",
    "torch.load without weights_only": r"\btorch\.load\((?!.*weights_only=True)",
    "fixed socket buffers": r"\bSO_(?:SND|RCV)BUF\b",
    "shell=True": r"\bshell\s*=\s*True\b",
    "unfinished work": r"\b(?:TO" r"DO|FIX" r"ME|XXX)\b",
    "swallowed errors": r"except(?: Exception| BaseException)?:\s*(?:#.*)?\n\s*pass\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_in_the_tree_uses(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = [name_of(path) for path in sources(*PACKAGES, "benchmarks", "tools") if pattern.search(path.read_text())]
    assert found == []


def test_rules_above_can_fail() -> None:
    samples = {
        "QoS 2": "publish(qos=2)",
        "pickle": "import pickle",
        "torch.load without weights_only": "torch.load(path)",
        "fixed socket buffers": "SO_SNDBUF",
        "shell=True": "run(x, shell=True)",
        "unfinished work": "# TO" + "DO: later",
        "swallowed errors": "except Exception:\n    pass",
    }
    assert samples.keys() == FORBIDDEN.keys()
    assert all(re.search(FORBIDDEN[what], text, re.MULTILINE) for what, text in samples.items())


def test_every_package_says_what_it_is() -> None:
    silent = [
        name_of(path)
        for path in sources(*PACKAGES, "benchmarks", "tools")
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
