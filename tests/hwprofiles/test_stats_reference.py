"""Statistics against numpy and scipy on known samples.

What scipy says of the samples below stands in golden/scipy.json, with its version, and is asked again here: scipy is
installed for development, never on boards. EDGELAM_WRITE_GOLDENS=1 writes the file.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
from scipy import stats as theirs

from hwprofiles import stats
from hwprofiles.report.compare import ratio_interval

GOLDEN = Path(__file__).parent / "golden" / "scipy.json"


def known() -> dict[str, list[float]]:
    """Made of integers by fixed rules, so that any machine has the same; no two values of one sample are equal."""
    found = {}
    for count in (6, 12, 30, 59, 200):
        order = list(range(count))
        random.Random(count).shuffle(order)
        found[f"skewed-{count}"] = [(100 + at * at / 7 + 1) / 1e4 for at in order]
        found[f"rising-{count}"] = [(100 + 3 * place + at % 5 + at / 1000) / 1e4 for place, at in enumerate(order)]
    return found


SAMPLES = known()


def by_scipy() -> dict[str, Any]:
    said: dict[str, Any] = {"scipy": scipy.__version__, "samples": {}}
    for name, values in SAMPLES.items():
        third = len(values) // 3
        first, last = values[:third], values[-third:]
        interval = theirs.quantile_test(values, q=float(np.median(values)), p=0.5).confidence_interval(0.95)
        u = theirs.mannwhitneyu(last, first, method="asymptotic", use_continuity=False, alternative="greater")
        said["samples"][name] = {
            "deviation": float(theirs.median_abs_deviation(values)),
            "median_interval": [float(interval.low), float(interval.high)],
            "rank_sum_z": float(theirs.norm.isf(u.pvalue)),
        }
    a, b = (SAMPLES[f"skewed-{count}"] for count in (30, 59))
    ratio = theirs.bootstrap(
        (a, b),
        lambda x, y, axis: np.median(y, axis=axis) / np.median(x, axis=axis),
        method="percentile",
        n_resamples=50_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    said["ratio_interval"] = [float(ratio.low), float(ratio.high)]
    return said


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    if os.environ.get("EDGELAM_WRITE_GOLDENS"):
        GOLDEN.write_text(json.dumps(by_scipy(), indent=1) + "\n")
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def test_the_golden_file_is_what_scipy_says(golden: dict[str, Any]) -> None:
    now = by_scipy()
    assert now["samples"].keys() == golden["samples"].keys()
    for name, said in now["samples"].items():
        for what, value in said.items():
            assert golden["samples"][name][what] == pytest.approx(value, rel=1e-9), (name, what)
    assert golden["ratio_interval"] == pytest.approx(now["ratio_interval"], rel=0.01)


@pytest.mark.parametrize("name", SAMPLES)
def test_medians_and_percentiles_are_those_of_numpy(name: str) -> None:
    values = SAMPLES[name]
    assert stats.median(values) == pytest.approx(np.median(values), rel=1e-12)
    for share in (0.05, 0.1, 0.5, 0.9, 0.95, 0.99):
        found = stats.percentile(values, share)
        assert found is None or found == np.quantile(values, share, method="inverted_cdf")
        assert (found is None) == (max(share, 1 - share) ** len(values) > 0.05)


@pytest.mark.parametrize("name", SAMPLES)
def test_deviation_interval_and_drift_score_are_those_of_scipy(name: str, golden: dict[str, Any]) -> None:
    values, theirs = SAMPLES[name], golden["samples"][name]
    assert stats.deviation(values) == pytest.approx(theirs["deviation"], rel=1e-9)
    assert stats.median_interval(values) == pytest.approx(tuple(theirs["median_interval"]), rel=1e-9)
    moved = stats.drift(values)
    assert (moved is None) == (len(values) < 12)
    assert moved is None or moved.score == pytest.approx(theirs["rank_sum_z"], rel=1e-6)


def test_the_interval_of_a_ratio_is_that_of_scipys_bootstrap(golden: dict[str, Any]) -> None:
    """2000 of our resamples against 50 000 of scipy's: the ends differ by chance, by less than 3 %."""
    found = ratio_interval(SAMPLES["skewed-30"], SAMPLES["skewed-59"], seed=7)
    assert found == pytest.approx(tuple(golden["ratio_interval"]), rel=0.03)
