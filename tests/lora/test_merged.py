"""An encoder with a trained adapter becomes a model of its own, which tells labels as the formulas do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.rounds.adapters import files_of, spec_of
from coordinator.rounds.job import Adapter, Job
from coordinator.rounds.store import JobRecord
from models.cache import file_digest
from models.engine.items import ItemStage
from models.formats import safetensors
from models.formats.bert import MATRICES, read_bert_config
from models.items.manifest import bundle, views
from models.items.pack import pack_items
from models.lora.adapter import HEAD, flat, shapes
from models.lora.merged import forget, merged, merged_at
from models.lora.serving import is_kept, keep, load
from models.lora.whole import to_file
from tests.models.tiny_bert import mean_of, random_bert, write_bert
from wire.errors import CorruptData, Refused

LABELS = ("net", "games", "sound")
JOB = Job(
    name="n", model="m", data="d", adapter=Adapter(rank=2, matrices=("q", "o", "up", "down")), labels=LABELS
)  # fmt: skip


class Trained:
    """A tiny encoder, and an adapter as a job leaves it, in a folder; a cache beside that."""

    def __init__(self, folder: Path, job: Job = JOB, seed: int = 3) -> None:
        self.cache = folder.parent / "cache"
        self.source = write_bert(folder / "tiny")
        self.digest = file_digest(self.source / "model.safetensors", self.cache)
        config = read_bert_config(self.source)
        rng = np.random.default_rng(seed)
        shaped = shapes(config, spec_of(job))
        self.factors = {name: 0.3 * rng.standard_normal(shape).astype(np.float32) for name, shape in shaped.items()}
        record = JobRecord(job=job, state="done", base=self.digest)
        self.adapter = folder / "adapter"
        self.adapter.mkdir(parents=True)
        for name, data in files_of(config, record, flat(self.factors, shaped), []).items():
            (self.adapter / name).write_bytes(data)

    def weights(self) -> dict[str, Any]:
        return to_file(read_bert_config(self.source), self.factors)

    def merged(self) -> Path:
        return merged(keep(self.adapter, self.cache), "tiny", self.source, self.digest, self.cache)

    def shares(self, tokens: list[int]) -> Any:
        """By the formulas, with the products in the weights."""
        tensors = {name: values.astype(np.float64) for name, values in random_bert().items()}
        for name, a in self.factors.items():
            if name.endswith(".a"):
                _, block, matrix, _ = name.split(".")
                b = self.factors[f"{name[:-1]}b"].astype(np.float64)
                tensors[f"encoder.layer.{block}.{MATRICES[matrix]}.weight"] += spec_of(JOB).scale * b @ a
        if not any(name.endswith(".a") for name in self.factors):
            tensors.update({name: values.astype(np.float64) for name, values in self.weights().items()})
        head = self.factors[HEAD].astype(np.float64)
        scores = head[:, :-1] @ mean_of(tokens, tensors, 4) + head[:, -1]
        found = np.exp(scores - scores.max())
        return found / found.sum()


@pytest.mark.parametrize("train", ["factors", "blocks"])
def test_it_tells_labels_as_the_formulas_do_however_it_is_cut(train: Any, tmp_path: Path) -> None:
    trained = Trained(tmp_path / "t", msgspec.structs.replace(JOB, train=train))
    folder = trained.merged()
    packed = pack_items(folder, "tiny-n", trained.cache)
    assert packed.config.labels == LABELS
    tokens = [2, 7, 8, 9, 10, 11, 3]
    for cuts in ([], [2]):
        given = {"tokens": np.array(tokens, np.int64)}
        data = bundle(packed.config.inputs, len(tokens), given)
        for first, end in zip([0, *cuts], [*cuts, len(packed.parts)], strict=True):
            path = tmp_path / f"{first}-{end}.onnx"
            path.write_bytes(packed.parts.graph_of(first, end)[0])
            stage = ItemStage.load(path, list(packed.files.values()), 1)
            data = stage.run(data, len(tokens))
        [port] = packed.config.outputs
        found = views([port], len(tokens), data)[port.name]
        np.testing.assert_allclose(found, trained.shares(tokens), atol=1e-5)
    assert trained.merged() == folder, "it is made once"
    assert (folder / "tokenizer.json").read_bytes() == (trained.source / "tokenizer.json").read_bytes()


def test_weights_that_are_not_those_of_the_model_s_blocks_are_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "t", msgspec.structs.replace(JOB, train="blocks"))
    path, good = trained.adapter / "adapter_model.safetensors", trained.weights()
    first = next(iter(good))
    for tensors, kind, words in (
        ({name: good[name] for name in list(good)[1:]}, Refused, "has not the weights"),
        ({**good, "embeddings.LayerNorm.weight": np.zeros(32, np.float32)}, Refused, "has not the weights"),
        ({**good, first: good[first][:-1]}, CorruptData, "are due"),
        ({**good, first: np.full_like(good[first], np.nan)}, CorruptData, "finite numbers"),
    ):
        safetensors.write(path, tensors)
        with pytest.raises(kind, match=words):
            trained.merged()
    adapter_id = keep(trained.adapter, trained.cache)
    with pytest.raises(Refused, match="peft_type EDGELAM_BLOCKS"):
        load(adapter_id, read_bert_config(trained.source), trained.cache)


def test_the_source_stays_as_it_was(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "t")
    before = (trained.source / "model.safetensors").read_bytes()
    trained.merged()
    assert (trained.source / "model.safetensors").read_bytes() == before
    assert not read_bert_config(trained.source).edgelam_labels


def test_another_task_module_is_another_adapter(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "t")
    one = keep(trained.adapter, trained.cache)
    head = trained.adapter / "head.safetensors"
    file = safetensors.open_safetensors(head)
    parts = {name: np.array(file.float32(name)) + np.float32(1) for name in file.tensors}
    head.write_bytes(safetensors.to_bytes(parts, dict(file.metadata)))
    assert keep(trained.adapter, trained.cache) != one


def test_what_is_no_adapter_for_labels_is_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "t")
    head = trained.adapter / "head.safetensors"
    whole = head.read_bytes()
    head.unlink()
    with pytest.raises(Refused, match=r"no head\.safetensors"):
        trained.merged()
    weight, bias = np.zeros((3, 32), np.float32), np.zeros(3, np.float32)
    told = {"labels": msgspec.json.encode(LABELS).decode()}
    for parts, metadata, error in (
        ({"weight": weight[:2], "bias": bias}, told, Refused),
        ({"weight": weight, "bias": bias[:2]}, told, Refused),
        ({"weight": weight}, told, CorruptData),
        ({"weight": weight, "bias": bias}, {}, CorruptData),
        ({"weight": weight, "bias": bias}, {"labels": "[1]"}, CorruptData),
        ({"weight": weight, "bias": bias + np.float32("nan")}, told, CorruptData),
    ):
        head.write_bytes(safetensors.to_bytes(parts, metadata))
        with pytest.raises(error):
            trained.merged()
    head.write_bytes(whole)
    with pytest.raises(Refused, match="another checkpoint"):
        merged(keep(trained.adapter, trained.cache), "tiny", trained.source, f"sha256:{1:064x}", trained.cache)
    assert trained.merged().is_dir()


def test_what_was_made_can_be_forgotten_and_made_again(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "t")
    folder = trained.merged()
    packed = pack_items(folder, "tiny-n", trained.cache)
    adapter = folder.parent.name
    assert merged_at(adapter, trained.cache) == [folder]
    forget(folder, trained.cache)
    assert not folder.exists() and not any(path.exists() for path in packed.files.values())
    assert merged_at(adapter, trained.cache) == [] and is_kept(adapter, trained.cache)
    assert trained.merged() == folder
    assert pack_items(folder, "tiny-n", trained.cache).files == packed.files
