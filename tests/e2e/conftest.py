from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site, running_site, write_tiny_model


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
