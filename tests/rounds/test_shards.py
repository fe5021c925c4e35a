"""Which boards share a block, and how much each has of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from coordinator.rounds.bases import Base, Part
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.jobfile import job_of
from coordinator.rounds.shards import shards_of, shares_of
from coordinator.rounds.trunks import where_text
from models.families.bert import BertConfig
from models.training.memory import hub_peak_bytes, shard_peak_bytes
from tests.rounds.test_trunks import GB, Coordinator, info_of
from wire.errors import UsageError

JOB = Job(
    name="n", model="m", data="notes", mode="looped", train="blocks", labels=("x", "y"), adapter=Adapter(),
    rounds=Rounds(),
)  # fmt: skip
CONFIG = BertConfig(
    model_type="bert", hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
    vocab_size=1000, max_position_embeddings=512,
)  # fmt: skip


def base_of(config: BertConfig = CONFIG) -> Base:
    part = Part(graph=b"", files={}, ends=True, end_block=0)
    return Base(
        config=config, parts={"ends": part}, tokenizer=b"", digest="", end_id=None, wire_dtype="f32",
    )  # fmt: skip


def boards(infos: list[Any], rates: dict[str, float], links: dict[str, float] | None = None) -> Any:
    found = Coordinator([msgspec.structs.replace(one, knows_looped=True) for one in infos], rates)
    if links is not None:
        profiles = found.profiles()
        for name, profile in profiles.items():
            profile.link = links[name]
        found.profiles = lambda: profiles  # type: ignore[method-assign]
    return found


def rows_of(cuts: Any) -> list[tuple[str, str, int, int]]:
    return [(one.device, one.role, *((one.share.heads, one.share.columns) if one.share else (0, 0))) for one in cuts]


def test_faster_boards_have_more_heads_and_columns_and_the_fastest_link_sums_up(monkeypatch: Any) -> None:
    monkeypatch.setattr("coordinator.rounds.shards.link_rate", lambda profile: profile.link)
    infos = [info_of("a"), info_of("b"), info_of("c")]
    coordinator = boards(infos, {"a": 30.0, "b": 10.0, "c": 20.0}, {"a": 1e6, "b": 9e6, "c": 2e6})
    found = shards_of(coordinator, JOB, base_of(), ("a",))
    assert rows_of(found.cuts) == [("b", "hub", 0, 0), ("a", "shard", 6, 768), ("b", "shard", 2, 256),
                                   ("c", "shard", 4, 512)]  # fmt: skip
    shares = [one.share for one in found.cuts[1:]]
    assert shares[0].end_head == shares[1].first_head and shares[2].end_column == 1536
    assert "GFLOP/s: 30, 10, 20; the hub since its link is the fastest, 8.6 MB/s" in found.because
    text = where_text(found.cuts, found.because)
    assert text.startswith("the shards are on a (6 heads, 768 columns), b (2 heads, 256 columns), c")
    assert "the hub on b: all 3" in text


def test_who_can_t_have_a_share_is_told_and_two_are_the_least() -> None:
    infos = [
        info_of("a"),
        info_of("bare", engines=()),
        msgspec.structs.replace(info_of("small"), memory_bytes=GB // 4),
    ]
    coordinator = boards(infos, {})
    coordinator._infos.append(info_of("past"))
    found = shards_of(coordinator, JOB, base_of(), ())
    assert not found.cuts
    assert found.unable["bare"] == "no torch: not looked for"
    assert found.unable["past"] == "its software, 0.1.0, knows no shares of a block"
    assert "for one head" in found.unable["small"] and "one of 1 that could have" in found.unable["a"]


def test_the_job_names_them_or_who_was_passed_over_comes_last() -> None:
    infos = [info_of(name) for name in ("a", "b", "c")]
    coordinator = boards(infos, {"a": 9.0, "b": 9.0, "c": 1.0})
    named = shards_of(coordinator, msgspec.structs.replace(JOB, trunk=("c", "b")), base_of(), ())
    assert [one.device for one in named.cuts] == ["b", "c", "b"] and "the job names them" in named.because
    assert "no link was measured" in named.because
    lacking = shards_of(coordinator, msgspec.structs.replace(JOB, trunk=("c", "x")), base_of(), ())
    assert not lacking.cuts and lacking.unable["x"] == "not heard of"
    assert {one.device for one in shards_of(coordinator, JOB, base_of(), (), ("a",)).cuts} == {"b", "c"}
    assert {one.device for one in shards_of(coordinator, JOB, base_of(), (), ("a", "b")).cuts} == {"a", "b", "c"}


def test_there_are_no_more_shards_than_heads() -> None:
    coordinator = boards([info_of(f"b{number:02}") for number in range(20)], {})
    found = shards_of(coordinator, JOB, base_of(), ())
    assert len(found.cuts) == 13 and all(one.share.heads == 1 for one in found.cuts[1:] if one.share)


@given(some.data())
def test_shares_sum_to_a_whole_block_and_go_into_memory(data: some.DataObject) -> None:
    heads = data.draw(some.integers(1, 16))
    columns = data.draw(some.one_of(some.integers(heads, 200), some.integers(heads, 100).map(lambda one: 16 * one)))
    config = BertConfig(
        model_type="bert", hidden_size=8 * heads, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=columns, vocab_size=10, max_position_embeddings=512,
    )  # fmt: skip
    base = base_of(config)
    count = data.draw(some.integers(1, heads))
    least, whole = base.shard_bytes(JOB, 1, 1), base.shard_bytes(JOB, heads, columns)
    memory = [data.draw(some.integers(least, whole)) for _ in range(count)]
    rates = [data.draw(some.sampled_from([0.0, 1.0, 3.0, 50.0])) for _ in range(count)]
    shares = shares_of(base, JOB, memory, rates)
    if not shares:
        assert any(held < whole for held in memory)
        return
    assert [share.first_head for share in shares] == [0, *(share.end_head for share in shares[:-1])]
    assert [share.first_column for share in shares] == [0, *(share.end_column for share in shares[:-1])]
    assert (shares[-1].end_head, shares[-1].end_column) == (heads, columns)
    for share, held in zip(shares, memory, strict=True):
        assert share.heads >= 1 and share.columns >= 1
        assert base.shard_bytes(JOB, share.heads, share.columns) <= held


def test_a_shard_is_foretold_the_same_at_any_depth_and_a_hub_more_with_each() -> None:
    deep = msgspec.structs.replace(CONFIG, num_hidden_layers=24)
    assert shard_peak_bytes(CONFIG, 6, 768, 512, 128) == shard_peak_bytes(deep, 6, 768, 512, 128)
    spec: Any = SimpleNamespace(labels=2)
    more = hub_peak_bytes(deep, spec, 512, 2, 3) - hub_peak_bytes(CONFIG, spec, 512, 2, 3)
    assert more == 18 * 2 * 4 * 4 * 384 * 512, "two sums of each further depth, of each board's batch, and as much free"


def test_all_that_does_not_go_with_it_is_said_at_once() -> None:
    good = {"name": "n", "model": "m", "data": "d", "mode": "looped", "train": "blocks", "labels": ["x", "y"]}
    assert job_of(good, "n").is_split
    bad = {
        **good, "train": "factors", "labels": [], "trunk": "a", "secure": True,
        "privacy": {"epsilon": 1.0}, "rounds": {"middle": "median", "aggregation": "svd", "who": "fastest"},
    }  # fmt: skip
    with pytest.raises(UsageError) as raised:
        job_of(bad, "n")
    about = ("train: 'blocks' with", "labels: missing", "trunk: one board", "secure: not with", "privacy: not with")
    for words in (*about, "rounds.middle", "rounds.aggregation", "rounds.who"):
        assert words in raised.value.message, words
    with pytest.raises(UsageError, match="33 boards, 32 at most"):
        job_of({**good, "trunk": [f"b{number}" for number in range(33)]}, "n")
