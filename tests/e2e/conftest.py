from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.losses import Model, running_losses_site
from tests.e2e.noise import once_more
from tests.e2e.site import Site, running_site, write_tiny_model

TIMEOUT_S = 300
"""A first test waits for a whole site to come up and measure itself, beside three others that do the same."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test on a shared site that fails while the machine stands still is called once more; a warning says so."""
    sites = [value for value in pyfuncitem.funcargs.values() if isinstance(value, Site)]
    if not sites:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    def settle() -> None:
        for site in sites:
            site.await_states(dict.fromkeys(site.states(), "online"))

    disturbed = once_more(lambda: pyfuncitem.obj(**arguments), settle)
    if disturbed:
        pyfuncitem.warn(
            pytest.PytestWarning(f"{pyfuncitem.name} failed at first, and held when tried again: {disturbed}")
        )
    return True


@pytest.fixture(scope="session", autouse=True)
def quick_measuring() -> Iterator[None]:
    """Boards measure themselves for real, but not for long: these tests are not about figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELAM_MEASURE_BUDGET", "0.05")
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three equal boards; shared by the tests of a file."""
    folder: Path = tmp_path_factory.mktemp("site")
    with running_site(folder, 3) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """What the stages must say, whatever was lost."""
    return Model(tiny_model, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def losing_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three unequal boards on links that can be cut; shared by the tests of a file."""
    folder = tmp_path_factory.mktemp("losses")
    with running_losses_site(folder) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)
