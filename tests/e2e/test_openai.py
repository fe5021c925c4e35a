"""The official OpenAI client against a real site: coordinator, broker, boards, workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.site import Site

DEPLOYED: dict[str, Any] = {"edgelam": {"context_tokens": 256, "boards_at_least": 2, "boards_at_most": 2}}
"""The settings that these tests deploy with once; after that a model is asked as it is deployed."""
PROMPT = "hello world and more words"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(site: Site, tiny_model: str) -> Iterator[openai.OpenAI]:
    """With the model in force on two boards."""
    with openai.OpenAI(base_url=f"{site.address['http_url']}/v1", api_key="any", max_retries=0, timeout=60) as made:
        made.completions.create(model=tiny_model, prompt="x", max_tokens=2, extra_body=DEPLOYED)
        yield made


def figures(site: Site) -> dict[str, float]:
    """Names of /metrics, with labels as Prometheus writes them, and their values."""
    page = httpx.get(f"{site.address['http_url']}/metrics").text
    return {
        sample.name + "".join(f",{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, tiny_model: str) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    asked: dict[str, Any] = {"model": tiny_model, "messages": messages, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert whole.usage is not None and whole.usage == chunks[-1].usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.completion_tokens == 16 or whole.choices[0].finish_reason == "stop"


def test_a_completion_is_what_edgelam_run_says(client: openai.OpenAI, site: Site, tiny_model: str) -> None:
    answer = client.completions.create(model=tiny_model, **GREEDY)
    own = site.run(tiny_model, 2, prompt=PROMPT, max_tokens=24, context_tokens=256, ignore_stop=False, speculate="auto")
    assert answer.choices[0].text == own["text"]
    assert answer.choices[0].finish_reason == own["finish_reason"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (own["prompt_tokens"], len(own["token_ids"]))


def test_a_model_in_force_is_not_deployed_anew(client: openai.OpenAI, site: Site, tiny_model: str) -> None:
    [before] = site.get("/v1/status")["deployments"]
    client.completions.create(model=tiny_model, **GREEDY)
    client.completions.create(model=tiny_model, **GREEDY, extra_body=DEPLOYED)
    [after] = site.get("/v1/status")["deployments"]
    assert len(before["plan"]["stages"]) == 2
    assert after["epoch"] == before["epoch"]


def test_a_stop_string_cuts_the_answer_where_it_begins(client: openai.OpenAI, tiny_model: str) -> None:
    text = client.completions.create(model=tiny_model, **GREEDY).choices[0].text
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        answer = client.completions.create(model=tiny_model, **GREEDY, stop=[stop, "never said"], stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_draws_the_same_again_and_none_draws_anew(client: openai.OpenAI, tiny_model: str) -> None:
    def draw(**seed: int) -> str:
        return client.completions.create(model=tiny_model, prompt=PROMPT, max_tokens=24, **seed).choices[0].text

    assert draw(seed=1) == draw(seed=1)
    assert len({draw() for _ in range(3)}) > 1


def test_the_model_is_listed_and_found_by_its_path(client: openai.OpenAI, tiny_model: str) -> None:
    assert tiny_model in [model.id for model in client.models.list()]
    assert client.models.retrieve(tiny_model).id == tiny_model


def test_mistakes_are_the_clients_own_errors(client: openai.OpenAI, tiny_model: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="no-such-model", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x", stream=True)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=tiny_model, prompt="x", temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=tiny_model, prompt="word " * 500)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="9 boards"):
        client.completions.create(model=tiny_model, prompt="x", extra_body={"edgelam": {"boards_at_least": 9,
                                  "boards_at_most": 9}})  # fmt: skip
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=tiny_model, prompt="x", extra_body={"edgelam": {"precision": "int5"}})


def test_a_client_that_hangs_up_ends_its_request(client: openai.OpenAI, site: Site, tiny_model: str) -> None:
    """The workers stand still meanwhile, so nothing else can end it."""
    agents = [psutil.Process(board.pid) for board in site.boards.status().boards]
    children = [child for agent in agents for child in agent.children(recursive=True)]
    workers = [child for child in children if "agent.workers.inference" in " ".join(child.cmdline())]
    assert len(workers) >= 2
    before = figures(site)
    try:
        stream = client.completions.create(model=tiny_model, prompt=PROMPT, temperature=2, stream=True, seed=3)
        next(iter(stream))
        for worker in workers:
            worker.suspend()
        assert figures(site)["edgelam_requests_live"] == 1
        stream.close()
        until(lambda: figures(site)["edgelam_requests_live"] == 0, "the request ends")
    finally:
        for worker in workers:
            worker.resume()
    cancelled = "edgelam_requests_total,outcome=cancelled"
    assert figures(site)[cancelled] == before[cancelled] + 1
    assert client.completions.create(model=tiny_model, **GREEDY).choices[0].text, "its slot is free"


def test_figures_move_with_every_answer(client: openai.OpenAI, site: Site, tiny_model: str) -> None:
    before = figures(site)
    usage = client.completions.create(model=tiny_model, **GREEDY, extra_body={"edgelam": {"speculate": "off"}}).usage
    assert usage is not None
    now = figures(site)

    def moved(name: str) -> float:
        return now[name] - before[name]

    assert moved("edgelam_prompt_tokens_total") == usage.prompt_tokens
    assert moved("edgelam_generated_tokens_total") == usage.completion_tokens
    assert moved("edgelam_time_to_first_token_seconds_count") == moved("edgelam_time_per_token_seconds_count") == 1
    ended = [name for name in now if name.startswith("edgelam_requests_total")]
    assert sum(map(moved, ended)) == 1
    stages = [name for name in now if name.startswith("edgelam_stage_decode_steps_total")]
    assert len(stages) == 2 and all(moved(name) >= usage.completion_tokens - 1 for name in stages)
    busy = [name for name in now if name.startswith("edgelam_stage_decode_busy_seconds_total")]
    assert all(moved(name) > 0 for name in busy)
    assert now["edgelam_devices,state=online"] == 3 and now["edgelam_broker_up"] == 1


@pytest.mark.slow
def test_without_boards_the_answer_is_that_the_service_is_unavailable(site: Site, tiny_model: str) -> None:
    """The last one of this file: the boards go."""
    site.boards.down()
    site.await_states(dict.fromkeys(site.states(), "offline"))
    with openai.OpenAI(base_url=f"{site.address['http_url']}/v1", api_key="any", max_retries=0, timeout=60) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model=tiny_model, prompt="x", stream=True, extra_body=DEPLOYED)
        assert raised.value.status_code == 503 and "try:" in raised.value.message
