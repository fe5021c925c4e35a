"""Adapters beside a model: what a row says is what the merged model says, and rows without one keep their bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.build.pack import Packed, pack
from models.engine.base import EngineFailed
from models.families.config import Family, LlamaConfig
from models.formats import safetensors
from models.formats.checkpoint import open_checkpoint
from models.lora.serving import CONFIG, TENSORS, is_kept, keep, kept_at, with_adapters
from tests.models.stages import WIRE_OF, Ring, load_stage, spec_of
from tests.models.tiny import random_tensors, tiny_config, write_gguf, write_hf
from wire.errors import CorruptData, EdgelamError, Refused, UsageError

PROMPT = np.array([5, 9, 2, 7, 11], np.int64)
SOME = np.array([3], np.int64)
LONG = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
ALL = tuple(LONG)


def size_of(config: LlamaConfig, matrix: str) -> tuple[int, int]:
    widths = {"q": config.q_width, "k": config.kv_width, "v": config.kv_width, "o": config.hidden,
              "gate": config.ffn, "up": config.ffn, "down": config.hidden}  # fmt: skip
    columns = {"o": config.q_width, "down": config.ffn}
    return widths[matrix], columns.get(matrix, config.hidden)


def adapter_files(
    folder: Path, config: LlamaConfig, rank: int, matrices: tuple[str, ...], seed: int, first: int = 0, **changes: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder as PEFT writes it, and what it adds to each matrix."""
    draw = np.random.default_rng(seed)
    tensors, added = {}, {}
    for block in range(first, config.blocks):
        for matrix in matrices:
            out, columns = size_of(config, matrix)
            a = (0.3 * draw.standard_normal((rank, columns))).astype(np.float32)
            b = (0.3 * draw.standard_normal((out, rank))).astype(np.float32)
            name = f"base_model.model.model.layers.{block}.{LONG[matrix]}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
            added[f"block.{block}.{matrix}"] = 16 / rank * b @ a
    folder.mkdir(parents=True)
    (folder / TENSORS).write_bytes(safetensors.to_bytes(tensors, {"format": "pt"}))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(settings | changes))
    return folder, added


class Shelf:
    """A tiny model with two adapters, and the same model with each of them merged."""

    def __init__(self, folder: Path, family: Family, precision: str, as_gguf: bool) -> None:
        self.folder, self.family, self.precision, self.as_gguf = folder, family, precision, as_gguf
        self.config = tiny_config(family)
        self.tensors = random_tensors(self.config)
        self.base = self.packed("base", {})
        self.cache = folder / "cache"
        self.ids, self.added = [], []
        for seed, (rank, matrices) in enumerate([(2, ALL), (3, ("q", "v", "down"))]):
            path, added = adapter_files(folder / f"adapter{seed}", self.config, rank, matrices, seed)
            self.ids.append(keep(path, self.cache))
            self.added.append(added)
        self.both = with_adapters(self.base, self.ids, self.cache)

    def packed(self, name: str, added: dict[str, np.ndarray]) -> Packed:
        tensors = {key: value + added[key] if key in added else value for key, value in self.tensors.items()}
        path = self.folder / name
        path.mkdir()
        written = (
            write_gguf(path / "model.gguf", self.config, tensors)
            if self.as_gguf
            else write_hf(path / "model", self.config, tensors)
        )
        return pack(open_checkpoint(written), self.precision, WIRE_OF[self.precision], self.folder / "cache")

    def stage(self, packed: Packed, **changes: Any) -> Any:
        folder = self.folder / f"stage{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        return load_stage(packed, folder, spec_of(packed, 0, packed.graph.blocks, **changes))


@pytest.mark.parametrize("as_gguf", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_row_with_an_adapter_says_what_the_merged_model_says(family: Family, as_gguf: bool, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, family, "f32", as_gguf)
    served = shelf.stage(shelf.both)
    for number, adapter in enumerate(shelf.ids):
        merged = shelf.stage(shelf.packed(f"merged{number}", shelf.added[number]))
        slot, alone = served.open(adapter), merged.open()
        for given, position in ((PROMPT, 0), (SOME, 5), (SOME, 6)):
            said = served.step(slot, given, position).copy()
            np.testing.assert_allclose(said, merged.step(alone, given, position), atol=2e-3, rtol=2e-3)
        served.close(slot)
        plain = shelf.stage(shelf.base)
        assert np.abs(said - plain.step(plain.open(), np.append(PROMPT, [3, 3]), 0)).max() > 0.1, "it changes something"


def test_an_adapter_of_the_last_block_says_what_the_merged_model_says_beside_others(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "llama", "f32", False)
    last = shelf.config.blocks - 1
    path, added = adapter_files(
        tmp_path / "last", shelf.config, 3, ("down",), 7, first=last, layers_to_transform=[last]
    )
    assert list(added) == [f"block.{last}.down"]
    adapter = keep(path, shelf.cache)
    merged = shelf.stage(shelf.packed("merged", added))
    expected = merged.step(merged.open(), PROMPT, 0)
    for ids in ([adapter], [shelf.ids[0], adapter]):
        served = shelf.stage(with_adapters(shelf.base, ids, shelf.cache))
        said = served.step(served.open(adapter), PROMPT, 0)
        np.testing.assert_allclose(said, expected, atol=2e-3, rtol=2e-3)
    plain = shelf.stage(shelf.base)
    assert np.abs(expected - plain.step(plain.open(), PROMPT, 0)).max() > 0.1, "it changes something"


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
def test_rows_without_an_adapter_keep_their_bits_beside_others(precision: str, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "llama", precision, False)
    served, plain = shelf.stage(shelf.both, slots=3), shelf.stage(shelf.base, slots=3)
    slots = [served.open(""), served.open(shelf.ids[0]), served.open(shelf.ids[1])]
    others = [plain.open() for _ in range(3)]
    for slot, other in zip(slots, others, strict=True):
        first, expected = served.step(slot, PROMPT, 0).copy(), plain.step(other, PROMPT, 0).copy()
        assert (first == expected).all() == (slot == slots[0])
    together, failed = served.step_many(slots, np.array([3, 3, 3]), [5, 5, 5])
    apart, _ = plain.step_many(others, np.array([3, 3, 3]), [5, 5, 5])
    assert not failed
    np.testing.assert_array_equal(together[0], apart[0])
    assert not (together[1] == apart[1]).all() and not (together[2] == together[1]).all()


def test_a_slot_that_is_opened_again_has_the_adapter_of_its_new_request(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "llama", "f32", False)
    served = shelf.stage(shelf.both, slots=1)
    said = {}
    for adapter in (*shelf.ids, "", shelf.ids[0]):
        slot = served.open(adapter)
        served.step(slot, PROMPT, 0)
        by_row = served.row(slot) if served.step(slot, SOME, 5) is not None else None
        assert by_row is not None and by_row.fill((4).to_bytes(4, "little"))
        by_row.run(6)
        by_row.settle(6)
        found = by_row.result.copy()
        assert (said.setdefault(adapter, found) == found).all()
        np.testing.assert_array_equal(found, served.step(slot, np.array([4]), 6))
        served.close(slot)
    assert len({tuple(found) for found in said.values()}) == 3


@pytest.mark.parametrize("precision", ["f32", "int4"])
def test_a_cut_changes_no_bit(precision: str, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "llama", precision, False)
    answers = []
    for cuts in ((), (1,), (1, 2)):
        folder = tmp_path / f"cuts{len(cuts)}"
        folder.mkdir()
        ring = Ring.of(shelf.both, folder, cuts)
        ring.slots = [stage.open(shelf.ids[1]) for stage in ring.stages]
        answers.append(ring.generate(PROMPT, 6))
    for tokens, logits in answers[1:]:
        assert tokens == answers[0][0]
        for one, other in zip(logits, answers[0][1], strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_adapter_that_a_stage_has_not_is_refused(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "llama", "f32", False)
    for stage in (shelf.stage(shelf.both), shelf.stage(shelf.base)):
        with pytest.raises(EngineFailed, match="is not in this stage"):
            stage.open("0" * 32)
        assert stage.open() == 0


def test_what_is_laid_out_is_found_again_and_counts_as_weights(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "llama", "f32", False)
    again = with_adapters(shelf.base, shelf.ids, shelf.cache)
    assert again == shelf.both and is_kept(shelf.ids[0], shelf.cache)
    more = again.graph.weight_bytes - shelf.base.graph.weight_bytes
    blocks = [module for module in again.graph.modules if module.kind == "block"]
    on_disk = [again.files[module.artifacts[-1]].stat().st_size for module in blocks]
    assert sum(on_disk) == pytest.approx(more, rel=0.2)
    assert with_adapters(shelf.base, shelf.ids[::-1], shelf.cache).files.keys() != again.files.keys()


def test_a_kept_adapter_is_not_that_of_the_folder_any_more(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "llama", "f32", False)
    (tmp_path / "adapter0" / TENSORS).write_bytes(b"nothing")
    assert with_adapters(shelf.base, shelf.ids, shelf.cache) == shelf.both
    with pytest.raises(CorruptData):
        with_adapters(shelf.base, [keep(tmp_path / "adapter0", shelf.cache)], shelf.cache)


LONGER = {
    "dots": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    "negative": "base_model.model.model.layers.-1.self_attn.q_proj.lora_A.weight",
    "zeros": "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
    "letter": "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
    "digits": "base_model.model.model.layers.\u0660.self_attn.q_proj.lora_A.weight",
}


SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [1]},
    "kind": {"peft_type": "IA3"},
    "rank": {"r": 0},
}


def bad(folder: Path, what: str) -> Path:
    """Folders that are no adapter of the tiny model."""
    config = tiny_config("llama")
    path, _ = adapter_files(folder / what, config, 2, ("q", "v"), 0)
    tensors = dict(safetensors.read(path / TENSORS))
    name = next(iter(tensors))
    if what == "nan":
        tensors[name] = np.full_like(tensors[name], np.nan)
    elif what == "shape":
        tensors[name] = tensors[name][:, :-1].copy()
    elif what == "half":
        tensors.pop(name)
    elif what == "blocks":
        tensors = {key.replace("layers.0.", "layers.99."): value for key, value in tensors.items()}
    elif what == "matrix":
        tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(name)
    elif what in ("huge", "overflow"):
        # Times zero they must be zero for rows that take no part; 3000 is more than is taken only with its scale of 8.
        name = name if what == "huge" else name.replace("lora_A", "lora_B")
        tensors[name] = np.full_like(tensors[name], 1e30 if what == "huge" else 3000)
    elif what in LONGER:
        tensors[LONGER[what]] = tensors.pop(name)
    elif what == "empty":
        tensors = {}
    else:
        settings = json.loads((path / CONFIG).read_text())
        settings |= {
            "dora": {"use_dora": True},
            "alora": {"alora_invocation_tokens": [1]},
            "kind": {"peft_type": "IA3"},
            "rank": {"r": 0},
        }[what]
        (path / CONFIG).write_text(json.dumps(settings))
    (path / TENSORS).write_bytes(safetensors.to_bytes(tensors))
    return path


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("nan", CorruptData, "no numbers"),
        ("shape", Refused, r"block.0.q.a is \[2, \d+\]"),
        ("half", Refused, "no other half"),
        ("blocks", Refused, "blocks"),
        ("matrix", Refused, "matrices"),
        ("empty", Refused, "no factors"),
        ("huge", Refused, r"values up to 1e\+30"),
        ("overflow", Refused, r"values up to 2\.4e\+04"),
        *((what, Refused, "matrices") for what in LONGER),
        ("alora", Refused, "alora_invocation_tokens"),
        ("dora", Refused, "use_dora"),
        ("kind", Refused, "IA3"),
        ("rank", CorruptData, "adapter_config.json"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused(
    what: str, kind: type[EdgelamError], text: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_hf(tmp_path / "m", tiny_config("llama"), random_tensors(tiny_config("llama"))))
    packed = pack(checkpoint, "f32", "f32", tmp_path / "cache")
    with pytest.raises(kind, match=text):
        with_adapters(packed, [keep(bad(tmp_path, what), tmp_path / "cache")], tmp_path / "cache")


def test_a_folder_without_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter_config\.json: no such file"):
        keep(tmp_path, tmp_path / "cache")
    assert not is_kept("0" * 32, tmp_path) and kept_at("0" * 32, tmp_path) == tmp_path / "adapters" / ("0" * 32)


def test_too_many_ranks_are_refused(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "llama", "f32", False)
    with pytest.raises(Refused, match="10 adapters of rank 2, 3, 2"):
        with_adapters(shelf.base, shelf.ids * 5, shelf.cache)
