"""Packed files and stage graphs: named by content, small, the same for the same model, and honest about their needs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx
import pytest

from models.build.keys import profile_key
from models.build.layout import block_weights
from models.build.pack import Packed, pack
from models.build.stage import build_stage_graph
from models.engine.manifest import read_manifest
from models.formats import safetensors
from tests.models.stages import packed_tiny, tiny_checkpoint
from tests.models.tiny import tiny_config
from wire.errors import UsageError
from wire.ids import is_digest

PRECISIONS = ["f32", "int8", "int4"]


def graph_of(config: Any, precision: str, wire: str, first: int, end: int, **parts: bool) -> bytes:
    settings = {"embedding": False, "head": False} | parts
    return build_stage_graph(config, precision, wire, first_block=first, end_block=end, **settings)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_each_module_has_its_files_by_digest_and_nothing_is_stored_twice(
    precision: str, tied: bool, tmp_path: Path
) -> None:
    packed = packed_tiny(tmp_path, "llama", precision, tied_embeddings=tied)
    for digest, path in packed.files.items():
        assert is_digest(digest)
        assert digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    used = [digest for module in packed.graph.modules for digest in module.artifacts]
    assert set(used) == set(packed.files)
    shared = set(packed.graph.module("embedding").artifacts) & set(packed.graph.module("head").artifacts)
    assert len(shared) == int(tied)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_bytes_a_module_claims_are_the_bytes_of_its_tensors(precision: str, family: Any, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, family, precision)
    for module in packed.graph.modules:
        stored = [tensor for digest in module.artifacts for tensor in safetensors.read(packed.files[digest]).values()]
        assert module.weight_bytes == sum(tensor.nbytes for tensor in stored)


def test_packing_again_reads_no_weights(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    first = pack(checkpoint, "int4", "f16", tmp_path / "cache")
    again = pack(_Unreadable(checkpoint), "int4", "bf16", tmp_path / "cache")
    assert again.files == first.files
    assert (again.graph.wire_dtype, first.graph.wire_dtype) == ("bf16", "f16")


@pytest.mark.parametrize("damage", ["index gone", "index garbage", "file gone", "file cut"])
def test_a_pack_that_was_cut_off_is_made_again(damage: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    packed = pack(checkpoint, "int8", "f16", tmp_path / "cache")
    file = packed.files[packed.graph.module("block.2").artifacts[0]]
    index = file.parent / "index.json"
    if damage == "index gone":
        index.unlink()
    elif damage == "index garbage":
        index.write_bytes(b'{"files": [[1]]')
    elif damage == "file gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    again = pack(checkpoint, "int8", "f16", tmp_path / "cache")
    assert again == packed
    assert f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" in again.files
    assert not [path for path in file.parent.iterdir() if path.name.startswith(".")]


class _Unreadable:
    """A checkpoint that was opened but whose tensors must not be asked for."""

    def __init__(self, checkpoint: Any) -> None:
        self.name, self.digest, self.config = checkpoint.name, checkpoint.digest, checkpoint.config

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


def test_progress_is_told_from_nothing_to_all(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(tiny_checkpoint(tmp_path), "int8", "f16", tmp_path, lambda done, of: told.append((done, of)))
    assert told == [(number, 6) for number in range(7)]


@pytest.mark.parametrize(("precision", "wire"), [("int5", "f16"), ("int4", "f8"), ("", "f16")])
def test_unknown_formats_are_the_users_mistake(precision: str, wire: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown") as caught:
        pack(tiny_checkpoint(tmp_path), precision, wire, tmp_path)
    assert "one of" in caught.value.try_
    with pytest.raises(UsageError, match="unknown"):
        graph_of(tiny_config(), precision, wire, 0, 1)


@pytest.mark.parametrize(("first", "end"), [(0, 0), (2, 2), (3, 2), (-1, 2), (0, 5)])
def test_a_stage_of_nothing_or_beyond_the_model_is_refused(first: int, end: int) -> None:
    with pytest.raises(UsageError, match="4 blocks"):
        graph_of(tiny_config(), "f32", "f32", first, end)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_are_small_and_the_same_each_time(precision: str) -> None:
    config = tiny_config("qwen3")
    data = graph_of(config, precision, "f16", 0, 4, embedding=True, head=True)
    assert data == graph_of(config, precision, "f16", 0, 4, embedding=True, head=True)
    assert len(data) < 40_000
    names = [node.name for node in onnx.load_from_string(data).graph.node]
    assert len(set(names)) == len(names)


def test_a_graph_says_which_weights_it_needs_without_an_onnx_library() -> None:
    config = tiny_config("qwen2")
    manifest = read_manifest(graph_of(config, "int4", "bf16", 1, 3), "graph")
    assert manifest.config == config
    assert (manifest.first_block, manifest.end_block, manifest.wire_dtype) == (1, 3, "bf16")
    assert manifest.weights == (*block_weights(config, 1, "int4"), *block_weights(config, 2, "int4"))


@pytest.mark.parametrize("wire", ["f16", "bf16"])
def test_the_residual_stream_takes_the_wire_dtype_at_every_block_boundary(wire: str) -> None:
    """Each block's last Add is followed by a cast to the wire dtype, and nothing else reads that Add."""
    model = onnx.load_from_string(graph_of(tiny_config(), "int4", wire, 0, 4, embedding=True, head=True))
    narrow = {"f16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[wire]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    assert len(sums) == 4
    for node in sums:
        (reader,) = readers[node.output[0]]
        assert reader.op_type == "Cast" and reader.attribute[0].i == narrow


def test_keys_tell_what_costs_differently_and_only_that(tmp_path: Path) -> None:
    keys = {
        profile_key(tiny_config(family), kind, precision, wire)  # type: ignore[arg-type]
        for family in ("llama", "qwen2", "qwen3")
        for kind in ("block", "head", "embedding")
        for precision in PRECISIONS
        for wire in ("f16", "f32")
    }
    # Blocks of three families differ; embeddings and heads of equal sizes don't.
    assert len(keys) == (3 + 1 + 1) * 3 * 2
    assert all(len(key) <= 256 for key in keys)
    assert profile_key(tiny_config("mistral"), "block", "int4", "f16") == profile_key(
        tiny_config("llama", max_context=99), "block", "int4", "f16"
    )


def test_graph_and_plan_agree_on_what_crosses_a_cut(tmp_path: Path) -> None:
    packed: Packed = packed_tiny(tmp_path, "llama", "int4")
    assert [edge.source for edge in packed.graph.edges] == ["embedding", *(f"block.{i}" for i in range(4))]
    assert {edge.bytes_per_token for edge in packed.graph.edges} == {64 * 2}
    assert packed.graph.max_context_tokens == packed.config.usable_context
