"""The real model on a real site: cut into one to four stages, over processes and a broker, it says the same words."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.build.pack import pack
from models.cache import cache_dir
from models.catalog import CATALOG
from models.fetch import is_cached
from models.formats.checkpoint import open_checkpoint
from tests.e2e.site import Site, board_names, running_site
from tests.models.stages import WIRE_OF, Ring
from wire.frames import header_bytes

pytestmark = [pytest.mark.download, pytest.mark.slow, pytest.mark.timeout(240)]

MODEL = CATALOG[0]
HIDDEN = 576
BLOCKS = 30
BYTES_OF = {"f32": 4, "f16": 2}
TOKENS = 20
CONTEXT = 256
BOARD_MEMORY_BYTES = 2 << 30
"""As the boards of the preset 'equal': one alone holds the model in any precision."""

REFERENCE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "models" / "golden" / "smollm2_reference.json").read_text()
)
CASE = REFERENCE["prompts"][1]
"""Its answer has no stop token, and `transformers` is sure of each of its first tokens."""


@pytest.fixture(scope="module")
def four_boards() -> Iterator[Site]:
    if not is_cached(MODEL, cache_dir()):
        pytest.skip(f"{MODEL.name} is not in the cache: edgelam model fetch {MODEL.name}")
    folder = Path(tempfile.mkdtemp(prefix="edgelam-test-"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EDGELAM_MEASURE_BUDGET", "0.02")  # twelve measurements in turn, and no figure of them counts
            with running_site(folder, 4, memory_bytes=BOARD_MEMORY_BYTES) as running:
                yield running
    finally:
        shutil.rmtree(folder)  # two gigabytes of weights in the boards' caches


def in_one_process(precision: str) -> list[int]:
    """What the engine says without boards, broker and cuts."""
    packed = pack(open_checkpoint(MODEL.path(cache_dir()), cache_dir()), precision, WIRE_OF[precision], cache_dir())
    with tempfile.TemporaryDirectory(prefix="edgelam-test-") as folder:
        ring = Ring.of(packed, Path(folder), (), context_tokens=CONTEXT)
        return ring.generate(np.array(CASE["ids"], np.int64), TOKENS)[0]


def shares(boards: int) -> list[tuple[str, int, int]]:
    """(board, first block, end block): as many blocks on each as can be, so that every cut is where it is meant to be
    whatever boards measured, and whatever is loaded already."""
    cuts = [BLOCKS * board // boards for board in range(boards + 1)]
    return list(zip(board_names(boards), cuts, cuts[1:], strict=False))


def pins(boards: int) -> list[tuple[str, str]]:
    """Ends of every share, and both ends of the model, each on its board."""
    each = shares(boards)
    ends = [(f"block.{block}", board) for board, first, end in each for block in (first, end - 1)]
    return [("embedding", each[0][0]), *ends, ("head", each[-1][0])]


def ask(site: Site, boards: int, precision: str) -> dict[str, Any]:
    return site.run(
        MODEL.name, boards, prompt=CASE["prompt"], raw=False, max_tokens=TOKENS, context_tokens=CONTEXT,
        precision=precision, objective="throughput", pins=pins(boards),
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["int4", "int8", "f32"])
def test_one_to_four_boards_say_what_one_process_says(four_boards: Site, precision: str) -> None:
    expected = in_one_process(precision)
    if precision == "f32":
        assert expected == CASE["tokens"][:TOKENS], "what transformers says"
    for boards in (1, 2, 3, 4):
        answer = ask(four_boards, boards, precision)
        assert answer["prompt_tokens"] == len(CASE["ids"])
        assert answer["token_ids"] == expected, f"{boards} boards"
        _assert_spread(four_boards.get("/v1/status")["deployments"][0]["plan"], boards)
        _assert_bytes(answer, precision)


def _assert_spread(plan: dict[str, Any], boards: int) -> None:
    """Cut where it was asked for: every block on one board, and blocks on each."""
    got = [(stage["device"], stage["first_block"], stage["end_block"]) for stage in plan["stages"]]
    assert got == shares(boards), plan["because"]


def _assert_bytes(answer: dict[str, Any], precision: str) -> None:
    """One hidden state a hop, one token id back: nothing else crosses while tokens are made."""
    hidden = header_bytes(2) + HIDDEN * BYTES_OF[WIRE_OF[precision]]
    *body, head = answer["stages"]
    assert [stage["sent_bytes_per_token"] for stage in body] == [hidden] * len(body)
    token = header_bytes(1) + 4 if body else 0  # a board alone keeps its tokens: they go to nobody but the user
    assert head["sent_bytes_per_token"] == token
    assert answer["bytes_per_token"] == len(body) * hidden + token
