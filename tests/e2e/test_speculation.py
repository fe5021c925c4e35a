"""Over slow links tokens are guessed unless somebody asks for something else, and the answer stays the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from testbed.links import WIFI
from tests.e2e.site import Site, running_site

PROMPT = "one two three one two three one two"


@pytest.fixture(scope="module")
def slow_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slow")
    with running_site(folder, 3, link=WIFI) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.7, "seed": 5}])
def test_the_same_prompt_gives_the_same_answer_however_long_rounds_take_and_on_any_cut(
    slow_site: Site, tiny_model: str, drawn: dict[str, float]
) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 48, "speculate": "auto", **drawn}
    answers = [slow_site.run(tiny_model, boards, **asked) for boards in (3, 3, 2, 2)]
    assert all(answer["token_ids"] == answers[0]["token_ids"] for answer in answers)
    assert drawn or all(answer["drafts_accepted"] > 0 for answer in answers)
    alone = slow_site.run(tiny_model, 1, **asked)
    assert len(alone["token_ids"]) == 48 and alone["drafts_sent"] == 0, "one board has no links to save"


@pytest.mark.slow
def test_whoever_asks_for_nothing_gets_guesses_here_and_the_plan_says_so(slow_site: Site, tiny_model: str) -> None:
    asked = ("--boards-at-least", "3", "--context", "128")
    plan = slow_site.cli("plan", tiny_model, *asked, "--explain")
    assert plan.returncode == 0 and "tokens are guessed: links take" in plan.stdout, plan.stderr
    done = slow_site.cli("run", tiny_model, "--prompt", PROMPT, "--raw", "--max-tokens", "48", "--ignore-stop", *asked)
    assert done.returncode == 0 and "tokens guessed: " in done.stderr, done.stderr
    done = slow_site.cli("run", tiny_model, "--prompt", PROMPT, "--raw", "--max-tokens", "48", "--ignore-stop", *asked,
                         "--speculate", "off")  # fmt: skip
    assert done.returncode == 0 and "tokens guessed: " not in done.stderr, done.stderr
