"""Two models in force at once, on boards that the other leaves out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.site import Site, write_tiny_model

BOARDS = {"first": ("board1", "board2"), "second": ("board3",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {name: str(write_tiny_model(folder, seed)) for seed, name in enumerate(BOARDS)}


def test_two_models_answer_at_the_same_time_each_on_its_own_boards(site: Site, models: dict[str, str]) -> None:
    def run(name: str) -> dict[str, Any]:
        others = tuple(board for other, boards in BOARDS.items() if other != name for board in boards)
        return site.run(models[name], len(BOARDS[name]), max_tokens=64, excluded=others)

    alone = {name: run(name) for name in BOARDS}
    epochs = {row["name"]: row["epoch"] for row in site.get("/v1/status")["deployments"]}
    together: dict[str, list[dict[str, Any]]] = {name: [] for name in BOARDS}

    def run_thrice(name: str) -> None:
        together[name] += [run(name) for _ in range(3)]

    threads = [threading.Thread(target=run_thrice, args=(name,)) for name in BOARDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, boards in BOARDS.items():
        assert len(together[name]) == 3
        for answer in (alone[name], *together[name]):
            assert {stage["device"] for stage in answer["stages"]} == set(boards)
            assert answer["token_ids"] == alone[name]["token_ids"]
    assert alone["first"]["token_ids"] != alone["second"]["token_ids"], "two models, not one twice"
    assert {row["name"]: row["epoch"] for row in site.get("/v1/status")["deployments"]} == epochs, "neither was moved"
