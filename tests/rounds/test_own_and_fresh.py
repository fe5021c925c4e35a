"""Rules by which devices keep B for themselves, or begin each round with factors of their own rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as some

from coordinator.rounds.adapters import aggregate, begun_by, down_length, factors_in, files_of, lost, spec_of, taken_by
from coordinator.rounds.bases import Base, Part
from coordinator.rounds.exchange import last_counted
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.orders import able_devices, check_messages, least_bytes
from coordinator.rounds.store import DeviceRound, JobRecord, RoundRecord
from models.families.bert import BertConfig
from models.formats import safetensors
from models.lora.adapter import HEAD, flat, initial, named, shapes
from models.lora.held import rank_of
from models.lora.serving import keep
from tests.models.tiny import tiny_config
from tests.rounds.test_trunks import Coordinator, info_of
from wire.errors import Refused, UsageError
from wire.messages import UpdateMeta

CONFIG = tiny_config()
BERT = BertConfig(
    model_type="bert", hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=9,
    max_position_embeddings=16,
)  # fmt: skip
RANKS = {"a": 1, "b": 3, "c": 2}
SAMPLES = {"a": 5, "b": 1, "c": 14}
MODULES = [f"block.{block}.{name}" for block in range(2) for name in ("q", "o", "down")]


def job(rule: str, most_rank: int = 64, ranks: dict[str, int] | None = None) -> Job:
    ranks = RANKS if ranks is None and rule == "stack" else ranks or {}
    adapter = Adapter(rank=4, alpha=6.0, matrices=("q", "o", "down"), ranks=ranks, most_rank=most_rank)
    return Job(name="n", model="m", data="d", adapter=adapter, rounds=Rounds(aggregation=rule), labels=("net", "games"))  # type: ignore[arg-type]


def begin(wanted: Job) -> Any:
    base = Base(config=BERT, parts={}, tokenizer=b"", digest="", end_id=None, wire_dtype="f32")
    return base.initial(wanted)


def trained(wanted: Job, number: int, start: Any, seed: int = 0) -> list[tuple[UpdateMeta, Any]]:
    """What devices might make of a round: steps in all directions from what they begin with."""
    found = []
    for device, samples in SAMPLES.items():
        begun = begun_by(BERT, wanted, device, number, start)
        step = np.random.default_rng([seed, number, samples]).standard_normal(len(begun), np.float32)
        found.append((UpdateMeta(round=number, device=device, samples=samples), begun + 0.1 * step))
    return found


def products(factors: dict[str, Any]) -> dict[str, Any]:
    return {name: factors[f"{name}.b"].astype(float) @ factors[f"{name}.a"].astype(float) for name in MODULES}


@given(some.integers(0, 10_000), some.permutations(sorted(SAMPLES)))
@with_settings(max_examples=20)
def test_a_round_of_stack_adds_the_weighted_sum_of_products_exactly_for_any_ranks(seed: int, order: list[str]) -> None:
    wanted, start = job("stack"), begin(job("stack"))
    learnt: dict[str, Any] = dict.fromkeys(MODULES, 0.0)
    for number in range(3):
        updates = trained(wanted, number, start, seed)
        after = aggregate(BERT, wanted, number, start, updates)
        mixed = sorted(updates, key=lambda one: order.index(one[0].device))
        assert aggregate(BERT, wanted, number, start, mixed).tobytes() == after.tobytes(), "whoever came first"
        parts = [(meta, named(vector, shapes(BERT, spec_of(wanted, meta.device)))) for meta, vector in updates]
        for name in MODULES:
            wants = [meta.samples / 20 * (one[f"{name}.b"].astype(float) @ one[f"{name}.a"]) for meta, one in parts]
            learnt[name] = learnt[name] + sum(wants)
        found = factors_in(BERT, wanted, after)
        for name, product in products(found).items():
            assert np.linalg.norm(product - learnt[name]) <= 1e-6 * np.linalg.norm(learnt[name])
        heads = [meta.samples / 20 * one[HEAD].astype(float) for meta, one in parts]
        np.testing.assert_allclose(found[HEAD], sum(heads), rtol=1e-5, atol=1e-7)
        assert rank_of(shapes(BERT, spec_of(wanted)), len(after)) == 6 * (number + 1)
        assert lost(BERT, wanted, number, start, updates, after) == 0
        start = after


def test_beyond_its_ranks_stack_keeps_the_best_of_what_was_learnt_and_says_what_it_lost() -> None:
    wanted, start = job("stack", most_rank=7), begin(job("stack"))
    exact_job = job("stack")
    for number in range(2):
        updates = trained(wanted, number, start)
        exact = products(factors_in(BERT, exact_job, aggregate(BERT, exact_job, number, start, updates)))
        after = aggregate(BERT, wanted, number, start, updates)
        told = lost(BERT, wanted, number, start, updates, after)
        start = after
    found = products(factors_in(BERT, wanted, after))
    missed = 0.0
    for name in MODULES:
        smaller = np.linalg.svd(exact[name])[1][7:]  # beyond the largest seven: nothing of rank 7 is nearer
        assert np.linalg.norm(found[name] - exact[name]) == pytest.approx(np.linalg.norm(smaller), rel=1e-3, abs=1e-6)
        missed += float((smaller**2).sum())
    whole = sum(float(np.linalg.norm(exact[name]) ** 2) for name in MODULES)
    assert told == pytest.approx(math.sqrt(missed / whole), rel=1e-3) and told > 0
    assert lost(BERT, job("fedsa"), 0, start, [], start) is None, "no other rule leaves anything out"


def test_what_stack_sends_has_as_many_ranks_as_there_are() -> None:
    wanted, start = job("stack"), begin(job("stack"))
    assert len(start) == 2 * 9, "the task module; of factors nothing was learnt yet"
    per_rank = 2 * (8 + 8 + 8 + 8 + 12 + 8)
    after = aggregate(BERT, wanted, 0, start, trained(wanted, 0, start))
    assert len(after) == 6 * per_rank + 18
    for device, rank in RANKS.items():
        assert down_length(BERT, wanted, device, len(after)) == len(taken_by(BERT, wanted, device, after)) == len(after)
        assert len(begun_by(BERT, wanted, device, 1, after)) == rank * per_rank + 18
    with pytest.raises(ValueError, match="for each rank"):
        factors_in(BERT, wanted, after[:-1])


def test_fresh_factors_add_nothing_and_are_others_in_each_round() -> None:
    wanted, start = job("stack"), begin(job("stack"))
    shaped = shapes(BERT, spec_of(wanted, "b"))
    first, second = (named(begun_by(BERT, wanted, "b", number, start), shaped) for number in (0, 1))
    small = named(begun_by(BERT, wanted, "a", 0, start), shapes(BERT, spec_of(wanted, "a")))
    for name in MODULES:
        assert not first[f"{name}.b"].any() and np.abs(first[f"{name}.a"]).max() > 0.1
        assert not (first[f"{name}.a"] == second[f"{name}.a"]).any()
        ratio = small[f"{name}.a"] / first[f"{name}.a"][:1]
        np.testing.assert_allclose(ratio, math.sqrt(3), rtol=1e-5)  # the first rank of the same draw, by its own size


def test_the_adapter_of_stack_has_its_ranks_and_counts_as_in_training(tmp_path: Path) -> None:
    wanted, start = job("stack"), begin(job("stack"))
    after = aggregate(BERT, wanted, 0, start, trained(wanted, 0, start))
    files = files_of(BERT, JobRecord(job=wanted, state="running"), after, [])
    settings = msgspec.json.decode(files["adapter_config.json"])
    assert settings["r"] == 6 and settings["lora_alpha"] / settings["r"] == pytest.approx(6.0 / 4)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    tensors = safetensors.read(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.encoder.layer.1.output.dense.lora_B.weight"].shape == (8, 6)
    assert safetensors.read(tmp_path / "head.safetensors")["weight"].shape == (2, 8)


def test_of_fedsa_a_and_the_task_module_are_shared_and_b_is_not_there() -> None:
    wanted = job("fedsa")
    start, shaped = begin(wanted), shapes(BERT, spec_of(wanted))
    updates = trained(wanted, 0, start)
    shared = len(start) - 4 * 2 * (8 + 8 + 8)
    for meta, vector in updates:
        assert len(vector) == shared == len(taken_by(BERT, wanted, meta.device, start))
        assert down_length(BERT, wanted, meta.device, len(start)) == shared
    after = aggregate(BERT, wanted, 0, start, updates)
    assert aggregate(BERT, wanted, 0, start, updates[::-1]).tobytes() == after.tobytes()
    found = named(after, shaped)
    parts = [(meta.samples / 20, named(vector, shaped, ("a", "c"))) for meta, vector in updates]
    for name in shaped:
        if name.endswith(".b"):
            assert not found[name].any()
        else:
            np.testing.assert_allclose(
                found[name], sum(w * one[name].astype(float) for w, one in parts), rtol=1e-5, atol=1e-7
            )


def test_half_the_bytes_where_matrices_are_square() -> None:
    adapter = Adapter(rank=2, matrices=("o",))
    jobs = [
        Job(name="n", model="m", data="d", adapter=adapter, rounds=Rounds(aggregation=rule))
        for rule in ("fedavg", "fedsa")
    ]
    plain, own = (
        [
            down_length(CONFIG, one, "a", 0),
            len(begun_by(CONFIG, one, "a", 0, flat(initial(CONFIG, spec_of(one)), shapes(CONFIG, spec_of(one))))),
        ]
        for one in jobs
    )
    assert [2 * count for count in own] == plain


def test_the_adapter_of_fedsa_is_not_taken_for_one_that_answers(tmp_path: Path) -> None:
    wanted = job("fedsa")
    for name, data in files_of(BERT, JobRecord(job=wanted, state="done"), begin(wanted), []).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(Refused, match="each board that took part has its own"):
        keep(tmp_path, tmp_path / "cache")


def test_boards_of_older_software_and_those_without_room_for_what_is_held_take_no_part() -> None:
    wanted = job("stack")
    base = Base(config=BERT, parts={"whole": Part(graph=b"", files={}, ends=True, end_block=2)}, tokenizer=b"",
                digest="", end_id=None, wire_dtype="f32")  # fmt: skip
    plain, room = (least_bytes(base, one, "small") for one in (job("fedsa"), wanted))
    assert room - plain == pytest.approx(3 * 4 * (64 * 2 * 52 + 18), abs=4)
    infos = [
        info_of("good", room, data=("d",), knows_own=True),
        info_of("past", room, data=("d",)),
        info_of("small", room - 1, data=("d",), knows_own=True),
    ]
    able, unable = able_devices(Coordinator(infos, {}), wanted, base)  # type: ignore[arg-type]
    assert able == ("good",) and "knows no aggregation stack" in unable["past"] and "would take" in unable["small"]


def test_what_is_held_has_to_fit_into_a_message() -> None:
    big = msgspec.structs.replace(BERT, hidden_size=2048, num_hidden_layers=24)
    base = Base(config=big, parts={}, tokenizer=b"", digest="", end_id=None, wire_dtype="f32")
    check_messages(base, job("stack", most_rank=16), 2)
    with pytest.raises(UsageError, match="factors of rank 256"):
        check_messages(base, job("stack", most_rank=256), 2)


def test_a_device_goes_on_from_the_last_round_in_which_its_update_counted() -> None:
    def over(number: int, train: bool = True, **devices: str) -> RoundRecord:
        told = {device: DeviceRound(refused=because) for device, because in devices.items()}
        return RoundRecord(round=number, trained=train, devices=told, loss=None, held_out_loss=None, wall_s=1.0,
                           down_bytes=0, up_bytes=0, ended_unix=0.0)  # fmt: skip

    rounds = [over(0, a="", b=""), over(1, a="no answer in time", b=""), over(2, train=False, a="", b="", c="")]
    assert last_counted(rounds) == {"a": 0, "b": 1}
