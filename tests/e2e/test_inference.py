"""One model, cut in any way over real processes and a real broker, gives one answer."""

from __future__ import annotations

import json
import threading

import pytest

from tests.e2e.site import Site
from wire.errors import Refused, UsageError
from wire.frames import header_bytes


@pytest.mark.parametrize(
    "precision", ["int4", pytest.param("int8", marks=pytest.mark.slow), pytest.param("f32", marks=pytest.mark.slow)]
)
def test_one_two_and_three_boards_give_the_same_tokens(site: Site, tiny_model: str, precision: str) -> None:
    answers = [site.run(tiny_model, boards, precision=precision) for boards in (1, 2, 3)]
    assert [len(answer["stages"]) for answer in answers] == [1, 2, 3]
    assert len(answers[0]["token_ids"]) == 8
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]
    assert answers[0]["text"] == answers[2]["text"]


def test_only_hidden_states_and_token_ids_cross_and_their_bytes_are_the_formula(site: Site, tiny_model: str) -> None:
    answer = site.run(tiny_model, 3)
    hidden_bytes = site.get("/v1/status")["deployments"][0]["plan"]["stages"][0]["hop_bytes"]
    first, second, head = answer["stages"]
    for stage in (first, second):
        assert stage["sent_bytes_per_token"] == stage["formula_bytes"] == hidden_bytes
    assert head["sent_bytes_per_token"] == head["formula_bytes"] == header_bytes(1) + 4
    assert answer["bytes_per_token"] == 2 * hidden_bytes + header_bytes(1) + 4


def test_the_same_seed_gives_the_same_draw_and_another_seed_another(site: Site, tiny_model: str) -> None:
    draws = [site.run(tiny_model, 2, temperature=1.5, seed=seed)["token_ids"] for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_a_long_prompt_in_chunks_gives_the_same_on_any_cut(site: Site, tiny_model: str) -> None:
    prompt = "hello world and more words " * 6
    answers = [site.run(tiny_model, boards, prompt=prompt) for boards in (1, 3)]
    assert answers[0]["prompt_tokens"] > 64, "the prompt must need more than one chunk"
    assert answers[0]["token_ids"] == answers[1]["token_ids"]


def test_the_command_line_gives_text_ids_stages_speed_and_bytes_as_json(site: Site, tiny_model: str) -> None:
    done = site.cli("run", tiny_model, "--prompt", "hello", "--raw", "--max-tokens", "4", "--boards-at-least", "2",
                    "--context", "128", "--ignore-stop", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema"] == "edgelam.run/1"
    assert len(answer["token_ids"]) == 4
    assert len(answer["stages"]) >= 2
    assert answer["tokens_per_s"] > 0
    assert answer["bytes_per_token"] > 0


def test_plan_json_names_every_block_once(site: Site, tiny_model: str) -> None:
    done = site.cli("plan", tiny_model, "--boards-at-least", "3", "--context", "128", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    covered = [block for stage in plan["stages"] for block in range(stage["first_block"], stage["end_block"])]
    assert covered == [0, 1, 2, 3]
    assert [stage["embedding"] for stage in plan["stages"]] == [True, False, False]
    assert [stage["head"] for stage in plan["stages"]] == [False, False, True]
    assert all(stage["because"] for stage in plan["stages"])


def test_plan_explain_gives_a_reason_for_every_board(site: Site, tiny_model: str) -> None:
    done = site.cli("plan", tiny_model, "--boards-at-least", "2", "--context", "128", "--explain")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("board1", "board2", "board3"))


def test_topics_tail_decodes_tensors_to_shape_and_type(site: Site, tiny_model: str) -> None:
    site.run(tiny_model, 2)
    enough = threading.Event()

    def keep_talking() -> None:
        while not enough.wait(0.5):
            site.run(tiny_model, 2)

    talker = threading.Thread(target=keep_talking)
    talker.start()
    done = site.cli("topics", "tail", "edgelam/v1/+/act/#", "--count", "12", "--seconds", "20")
    enough.set()
    talker.join()
    assert done.returncode == 0, done.stderr
    assert "HIDDEN F16[1x" in done.stdout
    assert "TOKENS I32[1]" in done.stdout


def test_top_and_devices_show_what_runs(site: Site, tiny_model: str) -> None:
    site.run(tiny_model, 2)
    top = site.cli("top", "--once")
    devices = site.cli("devices")
    assert top.returncode == devices.returncode == 0, top.stderr + devices.stderr
    assert "3 of 3 devices online" in top.stdout
    assert [line.split()[:2] for line in devices.stdout.splitlines()[2:5]] == [
        [name, "online"] for name in ("board1", "board2", "board3")
    ]
    assert "ready" in devices.stdout


def test_bench_prints_every_board_as_markdown(site: Site, tiny_model: str) -> None:
    done = site.cli("bench", "--model", tiny_model, "--markdown")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("board1", "board2", "board3"))
    assert "EMULATED" in done.stdout


def test_a_model_that_no_catalog_knows_is_a_usage_error(site: Site) -> None:
    done = site.cli("run", "no-such-model", "--prompt", "x")
    assert done.returncode == 2
    assert "no-such-model" in done.stderr
    assert "try:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs(site: Site, tiny_model: str) -> None:
    with pytest.raises(UsageError, match="context"):
        site.run(tiny_model, 1, prompt="word " * 200)


def test_more_boards_than_there_are_is_refused_with_the_reason(site: Site, tiny_model: str) -> None:
    with pytest.raises(Refused, match="9 boards"):
        site.run(tiny_model, 9)


def test_after_all_these_errors_the_next_request_still_works(site: Site, tiny_model: str) -> None:
    assert len(site.run(tiny_model, 3)["token_ids"]) == 8


@pytest.mark.parametrize("boards", [1, 3])
@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.7, "seed": 5}])
def test_guessed_tokens_are_those_that_single_guesses_give(
    site: Site, tiny_model: str, boards: int, drawn: dict[str, float]
) -> None:
    """Steps of two rows and of eight are of one class; so what is confirmed in rounds of either is the same."""
    asked = {"prompt": "one two three one two three one two", "max_tokens": 48, **drawn}
    few, many = (site.run(tiny_model, boards, speculate=most, **asked) for most in ("1", "7"))
    assert few["token_ids"] == many["token_ids"]
    assert len(many["token_ids"]) == 48
    assert 0 < many["drafts_sent"] >= many["drafts_accepted"]
    assert drawn or many["drafts_accepted"] > 0
    assert site.run(tiny_model, boards, **asked)["drafts_sent"] == 0


def test_the_command_line_guesses_and_says_how_well(site: Site, tiny_model: str) -> None:
    done = site.cli("run", tiny_model, "--prompt", "one two three one two three one", "--raw", "--max-tokens", "40",
                    "--boards-at-least", "2", "--context", "128", "--ignore-stop", "--speculate", "7")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens guessed: " in done.stderr
    refused = site.cli("run", tiny_model, "--prompt", "x", "--speculate", "12")
    assert refused.returncode == 2 and "off, auto, or 1 to 7" in refused.stderr
