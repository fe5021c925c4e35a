"""Features by random kernels: what they are by definition, and that they never change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from models.training import kernels as module
from models.training.kernels import PLACES, Kernels, dilations_of


@pytest.mark.parametrize(("columns", "window", "count"), [(1, 9, 8), (3, 40, 21), (6, 100, 64)])
def test_a_feature_is_the_share_of_places_at_which_its_kernel_is_positive(
    columns: int, window: int, count: int
) -> None:
    kernels = Kernels(columns, window, count, seed=3)
    given = np.random.default_rng(1).standard_normal((5, window, columns)).astype(np.float32)
    found = kernels.features(given)
    assert found.shape == (5, count) and found.dtype == np.float32
    expected: list[list[float]] = []
    for values in given:
        row = []
        for dilation, weights, biases in kernels.groups:
            for kernel in range(len(biases)):
                above = []
                for start in range(window - (PLACES - 1) * dilation):
                    total = float(biases[kernel])
                    for place in range(PLACES):
                        for column in range(columns):
                            total += float(weights[place, column, kernel]) * float(
                                values[start + place * dilation, column]
                            )
                    above.append(total > 0)
                row.append(2 * sum(above) / len(above) - 1)
        expected.append(row)
    np.testing.assert_allclose(found, np.array(expected), atol=1e-6)


def test_kernels_have_length_one_and_half_of_them_see_no_level() -> None:
    kernels = Kernels(4, 100, 200, seed=1)
    dilations, all_weights = [], []
    for dilation, weights, biases in kernels.groups:
        dilations.append(dilation)
        all_weights.append(weights)
        assert np.abs(biases).max() <= 1
        np.testing.assert_allclose(np.square(weights).sum(axis=(0, 1)), 1, rtol=1e-5)
        np.testing.assert_allclose(weights[:, :, ::2].sum(axis=0), 0, atol=1e-5)
        assert np.abs(weights[:, :, 1::2].sum(axis=0)).max() > 0.1
    assert dilations == dilations_of(100) == [1, 2, 4, 8]
    used = (np.concatenate(all_weights, axis=2) != 0).all(axis=0).sum(axis=0)
    assert set(used.tolist()) == {1, 2, 3, 4}, "one column or several"
    level = np.tile(np.float32([3, -2, 5, 1]), (1, 100, 1))
    still, flat = kernels.features(level)[0], kernels.features(np.zeros_like(level))[0]
    seen = np.concatenate([np.arange(len(biases)) % 2 for _, _, biases in kernels.groups]).astype(bool)
    # A sum of nothing but rounding has the sign of the bias, whatever the level.
    np.testing.assert_array_equal(still[~seen], flat[~seen])
    assert (still[seen] != flat[seen]).mean() > 0.2


def test_the_same_seed_gives_the_same_kernels_for_ever() -> None:
    """Adapters are of no use with others. `VERSION` grows with these numbers."""
    made = hashlib.sha256()
    for dilation, weights, biases in Kernels(2, 30, 16, seed=7).groups:
        made.update(f"{dilation} {np.round(weights, 4).tolist()} {np.round(biases, 4).tolist()}".encode())
    assert made.hexdigest() == "b899d9d2ac46be7be8d9bdfdbfa9b6e686efff2fd88d3e44ce7ba99c1c9f55e7"
    one, other = Kernels(2, 30, 16, seed=7), Kernels(2, 30, 16, seed=8)
    assert not np.array_equal(one.groups[0][1], other.groups[0][1])


def test_many_windows_give_what_each_of_them_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three are taken at once here, and two are left."""
    monkeypatch.setattr(module, "WORKING_BYTES", 3 * module.working_bytes(3, 400, 100))
    kernels = Kernels(3, 400, 100, seed=1)
    given = np.random.default_rng(1).standard_normal((8, 400, 3)).astype(np.float32)
    whole = kernels.features(given)
    np.testing.assert_allclose(whole, np.concatenate([kernels.features(one[None]) for one in given]), atol=2e-3)
    assert kernels.features(given[:0]).shape == (0, 100)
