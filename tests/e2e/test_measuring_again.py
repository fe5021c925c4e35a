"""Boards that are asked to measure again. On a site of its own: who has run more models measures for longer."""

from __future__ import annotations

import json

import pytest

from tests.e2e.site import Site

pytestmark = pytest.mark.slow


def test_bench_again_has_the_boards_that_are_named_measure_anew(site: Site, tiny_model: str) -> None:
    site.run(tiny_model, 1)
    before = {name: site.get(f"/v1/profiles/{name}") for name in ("board1", "board2")}
    done = site.cli("bench", "board1", "--model", tiny_model, "--again", "--json", timeout_s=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    [found] = [board["profile"] for board in report["boards"]]
    assert report["schema"] == "edgelam.report/1"
    assert report["boards"][0]["because"][0].startswith("emulated")
    assert "board1 measured" in done.stderr
    assert found == site.get("/v1/profiles/board1")
    assert found["conditions"]["measured_at_unix"] > before["board1"]["conditions"]["measured_at_unix"]
    assert site.get("/v1/profiles/board2") == before["board2"]
    assert site.cli("bench", "nobody", "--again", "--model", tiny_model).returncode == 2
