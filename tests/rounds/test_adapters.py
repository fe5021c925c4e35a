"""What devices are sent, what becomes of their updates, and the files that others load."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest

from coordinator.rounds.adapters import aggregate, files_of, parts_of, spec_of, taken_by
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.store import JobRecord
from models.families.bert import BertConfig
from models.formats import safetensors
from models.lora.adapter import HEAD, flat, from_peft, initial, named, shapes
from tests.models.tiny import tiny_config
from wire.messages import UpdateMeta

CONFIG = tiny_config(rope_interleaved=True)


def job(aggregation: str = "fedavg", **ranks: int) -> Job:
    adapter = Adapter(rank=4, matrices=("q", "down"), ranks=ranks)
    return Job(name="n", model="m", data="d", adapter=adapter, rounds=Rounds(aggregation=aggregation))  # type: ignore[arg-type]


def start_of(wanted: Job):
    return flat(initial(CONFIG, spec_of(wanted)), shapes(CONFIG, spec_of(wanted)))


def meta(device: str, samples: int) -> UpdateMeta:
    return UpdateMeta(round=0, device=device, samples=samples)


def moved(wanted: Job, device: str, seed: int, round_number: int = 0):
    """What a device might make of what it is sent."""
    shaped = shapes(CONFIG, spec_of(wanted, device))
    sent = flat(
        named(taken_by(CONFIG, wanted, device, start_of(wanted)), shaped), shaped, parts_of(wanted, round_number)
    )
    return sent + 0.01 * np.random.default_rng(seed).standard_normal(len(sent), np.float32)


def test_a_device_of_less_rank_is_sent_the_first_ranks_and_they_count_as_much() -> None:
    wanted = job("pad", small=2)
    whole, part = spec_of(wanted), spec_of(wanted, "small")
    assert (part.rank, part.scale) == (2, pytest.approx(whole.scale))
    start = start_of(wanted)
    assert taken_by(CONFIG, wanted, "large", start) is start
    sent = named(taken_by(CONFIG, wanted, "small", start), shapes(CONFIG, part))
    before = named(start, shapes(CONFIG, whole))
    assert (sent["block.1.down.a"] == before["block.1.down.a"][:2]).all()
    assert (sent["block.1.down.b"] == before["block.1.down.b"][:, :2]).all()


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora", "svd", "pad"])
def test_the_order_in_which_updates_come_changes_no_bit(rule: str) -> None:
    wanted = job(rule, **({"b": 2} if rule in ("svd", "pad") else {}))
    updates = [(meta(device, 3 + number), moved(wanted, device, number)) for number, device in enumerate("abc")]
    found = aggregate(CONFIG, wanted, 0, start_of(wanted), updates)
    assert (aggregate(CONFIG, wanted, 0, start_of(wanted), updates[::-1]) == found).all()
    assert len(found) == len(start_of(wanted)) and found.dtype == np.float32


def test_the_mean_is_by_samples_and_what_was_not_sent_stays() -> None:
    wanted = job("ffa")
    start = start_of(wanted)
    shaped = shapes(CONFIG, spec_of(wanted))
    updates = [(meta("a", 1), moved(wanted, "a", 1)), (meta("b", 3), moved(wanted, "b", 2))]
    found, before = named(aggregate(CONFIG, wanted, 0, start, updates), shaped), named(start, shaped)
    one, other = (named(vector, shaped, ("b",)) for _, vector in updates)
    for name in shaped:
        if name.endswith(".a"):
            assert (found[name] == before[name]).all()
        else:
            np.testing.assert_allclose(found[name], 0.25 * one[name] + 0.75 * other[name], rtol=1e-6, atol=1e-8)


def test_svd_of_different_ranks_is_the_mean_product() -> None:
    """Its rank is at most that of the adapter here, so nothing is lost."""
    wanted = job("svd", a=2, b=2)
    updates = [(meta("a", 1), moved(wanted, "a", 1)), (meta("b", 1), moved(wanted, "b", 2))]
    found = named(aggregate(CONFIG, wanted, 0, start_of(wanted), updates), shapes(CONFIG, spec_of(wanted)))
    parts = [named(vector, shapes(CONFIG, spec_of(wanted, entry.device))) for entry, vector in updates]
    for name in ("block.0.q", "block.3.down"):
        mean = sum(part[f"{name}.b"] @ part[f"{name}.a"] for part in parts) / 2
        made = found[f"{name}.b"] @ found[f"{name}.a"]
        best = np.linalg.svd(mean)[1][2:]  # the largest of them has rank 2
        assert np.linalg.norm(mean - made) == pytest.approx(np.linalg.norm(best), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("rule", ["pad", "svd"])
def test_ranks_of_which_nobody_took_part_stay_as_they_were(rule: str) -> None:
    wanted = job(rule, small=2)
    shaped = shapes(CONFIG, spec_of(wanted))
    start = start_of(wanted) + np.float32(0.5)
    sent = taken_by(CONFIG, wanted, "small", start)
    found = named(aggregate(CONFIG, wanted, 0, start, [(meta("small", 1), sent * 2)]), shaped)
    before = named(start, shaped)
    assert (found["block.1.down.a"][2:] == before["block.1.down.a"][2:]).all()
    assert (found["block.1.down.b"][:, 2:] == before["block.1.down.b"][:, 2:]).all()
    assert not (found["block.1.down.b"][:, :2] == before["block.1.down.b"][:, :2]).all()


def test_files_come_back_as_they_went() -> None:
    wanted = job()
    factors = start_of(wanted) + np.float32(0.1)
    files = files_of(CONFIG, JobRecord(job=wanted, state="running", base="sha256:x"), factors, [])
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json", "provenance.json"}
    config = msgspec.json.decode(files["adapter_config.json"])
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["r"] == 4


def test_the_tensors_are_those_of_the_job(tmp_path) -> None:
    wanted = job()
    factors = start_of(wanted) + np.float32(0.1)
    path = tmp_path / "a.safetensors"
    path.write_bytes(files_of(CONFIG, JobRecord(job=wanted, state="done"), factors, [])["adapter_model.safetensors"])
    back = from_peft(CONFIG, {name: np.array(values) for name, values in safetensors.read(path).items()})
    assert (flat(back, shapes(CONFIG, spec_of(wanted))) == factors).all()


def test_an_adapter_of_the_last_block_says_so_to_others(tmp_path) -> None:
    wanted = msgspec.structs.replace(job(), adapter=Adapter(rank=4, matrices=("q", "down"), blocks="last"))
    shaped = shapes(CONFIG, spec_of(wanted))
    last = CONFIG.blocks - 1
    assert list(shaped) == [f"block.{last}.{name}" for name in ("q.a", "q.b", "down.a", "down.b")]
    assert shaped[f"block.{last}.down.b"] == shapes(CONFIG, spec_of(job()))[f"block.{last}.down.b"]
    files = files_of(CONFIG, JobRecord(job=wanted, state="done"), start_of(wanted), [])
    config = msgspec.json.decode(files["adapter_config.json"])
    assert config["layers_to_transform"] == [last] and config["target_modules"] == ["down_proj", "q_proj"]
    path = tmp_path / "a.safetensors"
    path.write_bytes(files["adapter_model.safetensors"])
    back = from_peft(CONFIG, {name: np.array(values) for name, values in safetensors.read(path).items()})
    assert (flat(back, shaped) == start_of(wanted)).all()
    plain = files_of(CONFIG, JobRecord(job=job(), state="done"), start_of(job()), [])
    assert "layers_to_transform" not in msgspec.json.decode(plain["adapter_config.json"])
    encoder = msgspec.structs.replace(of_labels(), adapter=Adapter(rank=4, matrices=("q", "o", "down"), blocks="last"))
    factors = flat(initial(BERT, spec_of(encoder)), shapes(BERT, spec_of(encoder)))
    assert len(factors) == 4 * (8 + 8 + 8 + 8 + 12 + 8) + 2 * 9
    config = msgspec.json.decode(
        files_of(BERT, JobRecord(job=encoder, state="done"), factors, [])["adapter_config.json"]
    )
    assert re.fullmatch(config["target_modules"], "encoder.layer.1.output.dense")
    assert not re.fullmatch(config["target_modules"], "encoder.layer.0.output.dense")
    assert "layers_to_transform" not in config, "which goes with no pattern"


def test_who_has_changed_too_much_is_shortened_before_the_mean() -> None:
    plain = job()
    bounded = msgspec.structs.replace(plain, rounds=msgspec.structs.replace(plain.rounds, most_change=2.0))
    start = start_of(plain)
    step = np.ones(len(start), np.float32) / np.sqrt(len(start), dtype=np.float32)
    sent = [(meta("a", 1), start + step), (meta("b", 1), start + step), (meta("c", 1), start + 100 * step)]
    for wanted, length in ((plain, 34.0), (bounded, 4 / 3)):
        found = aggregate(CONFIG, wanted, 0, start, sent)
        assert np.linalg.norm((found - start).astype(float)) == pytest.approx(length, rel=1e-3)
    robust = msgspec.structs.replace(plain, rounds=msgspec.structs.replace(plain.rounds, middle="median"))
    found = aggregate(CONFIG, robust, 0, start, sent)
    assert np.linalg.norm((found - start).astype(float)) == pytest.approx(1.0, rel=1e-3)


BERT = BertConfig(
    model_type="bert", hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=9,
    max_position_embeddings=16,
)  # fmt: skip


def of_labels(aggregation: str = "fedavg", **ranks: int) -> Job:
    adapter = Adapter(rank=4, matrices=("q", "o", "down"), ranks=ranks)
    rounds = Rounds(aggregation=aggregation)  # type: ignore[arg-type]
    return Job(name="n", model="m", data="d", adapter=adapter, rounds=rounds, labels=("net", "games"))


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora", "svd", "pad"])
def test_the_task_module_is_the_mean_by_samples_in_every_round(rule: str) -> None:
    wanted = of_labels(rule, **({"b": 2} if rule in ("svd", "pad") else {}))
    shaped = shapes(BERT, spec_of(wanted))
    start = flat(initial(BERT, spec_of(wanted)), shaped)
    for number in range(2):
        parts, sent, heads = parts_of(wanted, number), [], []
        for device, samples in (("b", 3), ("a", 1)):
            of_device = shapes(BERT, spec_of(wanted, device))
            whole = named(taken_by(BERT, wanted, device, start), of_device)
            whole[HEAD] = np.random.default_rng(samples).standard_normal(whole[HEAD].shape, np.float32)
            heads.append(samples / 4 * whole[HEAD].astype(np.float64))
            sent.append((msgspec.structs.replace(meta(device, samples), round=number), flat(whole, of_device, parts)))
        found = named(aggregate(BERT, wanted, number, start, sent), shaped)
        np.testing.assert_allclose(found[HEAD], sum(heads), rtol=1e-6)
        assert (aggregate(BERT, wanted, number, start, sent[::-1]) == flat(found, shaped)).all()


def test_files_of_an_encoder_have_its_names_and_the_task_module_beside_them(tmp_path) -> None:
    wanted = of_labels()
    factors = flat(initial(BERT, spec_of(wanted)), shapes(BERT, spec_of(wanted))) + np.float32(0.25)
    files = files_of(BERT, JobRecord(job=wanted, state="done"), factors, [])
    config = msgspec.json.decode(files["adapter_config.json"])
    assert config["task_type"] == "FEATURE_EXTRACTION"
    layer = "encoder.layer.1"
    every = [f"{layer}.{name}" for name in ("attention.self.query", "attention.output.dense", "output.dense")]
    others = [f"{layer}.{name}" for name in ("attention.self.key", "intermediate.dense", "output.LayerNorm")]
    assert all(re.fullmatch(config["target_modules"], name) for name in every)
    assert not any(re.fullmatch(config["target_modules"], name) for name in others)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    tensors = safetensors.read(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2
    assert tensors["base_model.model.encoder.layer.1.attention.output.dense.lora_B.weight"].shape == (8, 4)
    head = safetensors.open_safetensors(tmp_path / "head.safetensors")
    assert msgspec.json.decode(head.metadata["labels"]) == ["net", "games"]
    assert head.view("weight").shape == (2, 8) and (head.view("bias") == 0.25).all()
