"""Hidden states in codecs over real processes and slow links: measured first, within a budget, never with exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.build.pack import pack
from models.cache import cache_dir
from models.formats.checkpoint import open_checkpoint
from testbed.links import LinkSpec
from tests.e2e.site import Site, running_site, write_tiny_model
from tests.models.stages import Ring, load_stage, spec_of
from wire.codecs import payload_bytes
from wire.coding import coder
from wire.errors import ExitCode, Refused, UsageError
from wire.frames import header_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SLOW = LinkSpec(rate_bytes_per_s=20_000.0, delay_s=0.002)
HIDDEN, TOKENS = 64, 8
BUDGET_PERCENT = 100.0
"""Words mean nothing to a model of random numbers: any error will do."""


@pytest.fixture(scope="module")
def slow_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder: Path = tmp_path_factory.mktemp("site")
    with running_site(folder, 3, link=SLOW) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


def unmeasured_model(folder: Path) -> str:
    """Another one for each try: nobody has measured its codecs."""
    seed = int.from_bytes(np.random.bytes(4), "little")
    place = folder / f"{seed:08x}"
    place.mkdir()
    return str(write_tiny_model(place, seed=seed))


def in_one_process(model: str, plan: dict[str, Any], prompt: list[int], folder: Path) -> list[int]:
    """What the stages of a plan say with its codecs between them."""
    packed = pack(open_checkpoint(Path(model), cache_dir()), "int4", "f16", cache_dir())
    stages = plan["stages"]
    parts = [
        spec_of(packed, s["first_block"], s["end_block"], embedding=s["embedding"], head=s["head"], context_tokens=128)
        for s in stages
    ]
    ring = Ring([load_stage(packed, folder, part) for part in parts])
    rows, position, tokens = np.array(prompt, np.int64), 0, []
    while len(tokens) < TOKENS:
        given: Any = rows
        for stage, engine, slot in zip(stages, ring.stages, ring.slots, strict=True):
            given = engine.step(slot, given, position)
            if not stage["head"]:
                crossing = coder(stage["codec" if len(rows) > 1 else "row_codec"], "f16", HIDDEN)
                given = crossing.decode(crossing.encode(given))
        position += len(rows)
        tokens.append(int(np.argmax(given)))
        rows = np.array(tokens[-1:], np.int64)
    return tokens


def test_coded_cuts_are_measured_first_then_planned_run_as_planned_and_never_exact(
    slow_site: Site, tmp_path: Path
) -> None:
    model = unmeasured_model(tmp_path)
    with pytest.raises(Refused, match="not measured") as refused:
        slow_site.run(model, 3, error_budget_percent=BUDGET_PERCENT)
    assert refused.value.try_ == f"edgelam model codecs {model} --precision int4"

    done = slow_site.cli("model", "codecs", model, "--tokens", "256", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "edgelam.codecs/1" and report["tokens"] == 256
    assert {cost["codec"] for cost in report["costs"]} == {"int8-group", "int8-token"}
    again = slow_site.cli("model", "codecs", model, "--tokens", "256")
    assert "measured before" in again.stderr and "int8-group" in again.stdout

    answer = slow_site.run(model, 3, error_budget_percent=BUDGET_PERCENT, max_tokens=TOKENS)
    [deployment] = slow_site.get("/v1/status")["deployments"]
    plan = deployment["plan"]
    codecs = [stage["codec"] for stage in plan["stages"]]
    assert set(codecs[:-1]) <= {"int8-group", "int8-token"} and codecs[-1] == "as-is", plan["because"]
    assert 0 < plan["perplexity_increase_percent"] <= BUDGET_PERCENT
    for measured, stage in zip(answer["stages"][:-1], plan["stages"], strict=False):
        assert stage["row_codec"] in (stage["codec"], "as-is")
        expected = header_bytes(2) + payload_bytes(stage["row_codec"], "f16", HIDDEN)
        assert measured["sent_bytes_per_token"] == measured["formula_bytes"] == stage["hop_bytes"] == expected
    assert answer["token_ids"] == in_one_process(model, plan, prompt_ids(model), tmp_path)

    shown = slow_site.cli("plan", model, "--boards-at-least", "3", "--context", "128", "--error-budget", "100")
    assert codecs[0] in shown.stdout and "perplexity rises by at most" in shown.stdout
    with pytest.raises(UsageError, match="exact, and an error budget"):
        slow_site.run(model, 3, error_budget_percent=1.0, exact=True)
    assert slow_site.cli("plan", model, "--error-budget", "-1").returncode == ExitCode.USAGE
    slow_site.run(model, 3, max_tokens=TOKENS)  # the workers stay, and with them what they had counted before
    plain = slow_site.run(model, 3, max_tokens=TOKENS)
    plain_bytes = [stage["sent_bytes_per_token"] for stage in plain["stages"][:-1]]
    assert plain_bytes == [header_bytes(2) + 2 * HIDDEN] * 2


def prompt_ids(model: str) -> list[int]:
    from models.text import Tokenizer

    return Tokenizer.from_checkpoint(open_checkpoint(Path(model), cache_dir())).encode("hello world")
