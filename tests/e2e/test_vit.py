"""The real image net on a real site: a picture gives the bits of the published file, however the net is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from models.cache import cache_dir
from models.catalog import find
from tests.e2e.site import Site, catalog_site
from tests.e2e.test_items import unoptimised

pytestmark = [pytest.mark.download, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def three_boards() -> Iterator[Site]:
    with catalog_site("vit", 3) as running:
        yield running


def test_pictures_over_three_boards_and_one_give_the_bits_of_the_file(three_boards: Site, tmp_path: Path) -> None:
    entry = find("vit")
    assert entry is not None
    across, down = np.meshgrid(np.linspace(-2, 2, 224), np.linspace(-2, 2, 224))
    pictures = [
        np.stack([np.exp(-((across - at) ** 2) - down**2), across, down])[None].astype(np.float32) for at in (-1, 1)
    ]
    for number, picture in enumerate(pictures):
        np.save(tmp_path / f"{number}.npy", picture)
    given = [word for number in range(2) for word in ("--input", str(tmp_path / f"{number}.npy"))]
    whole = onnxruntime.InferenceSession(
        str(entry.path(cache_dir())), unoptimised(), providers=["CPUExecutionProvider"]
    )
    for boards in ("3", "1"):
        spread = ("--boards-at-least", boards, "--boards-at-most", boards)
        done = three_boards.cli(
            "infer", "vit", *given, *spread, "--output", str(tmp_path / "out.npz"), "--json", timeout_s=200
        )
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["stages"]) == int(boards)
        written = np.load(tmp_path / "out.npz")
        for number, picture in enumerate(pictures):
            [expected] = whole.run(None, {"input_image": picture})
            np.testing.assert_array_equal(written[f"{number}/output_importance"], expected)
    assert float(np.ptp(expected)) > 0.1, "something is seen"
