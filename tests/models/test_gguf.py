"""GGUF files: what they hold is read right, and what is wrong with them is said."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.families.config import tensor_shapes
from models.formats.checkpoint import open_checkpoint
from models.formats.ggml import FORMATS, dequantise
from models.formats.gguf import open_gguf
from models.formats.gguf_checkpoint import canonical_name
from tests.models.tiny import (
    SPECIALS,
    gguf_name,
    permuted,
    random_tensors,
    tiny_config,
    vocabulary_tokens,
    write_gguf,
)
from wire.errors import CorruptData, EdgelamError, Refused, UsageError


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = tiny_config(blocks=1)
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", config, random_tensors(config), "Q8_0")
    return path.read_bytes()


def _with_keys(path: Path, arch: str = "llama", **keys: object) -> Path:
    """Write a GGUF with the given keys and nothing else."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, int(str(value)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("number", sorted(FORMATS))
def test_every_number_format_dequantises_as_the_reference_does_to_the_last_bit(number: int) -> None:
    kind = FORMATS[number]
    draw = np.random.default_rng(number)
    rows = draw.integers(0, 256, (7, 4 * kind.block_bytes), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # random scales are sometimes inf or nan
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(number))
    np.testing.assert_array_equal(dequantise(kind, rows), expected)


def test_sizes_of_number_formats_are_those_of_the_reference() -> None:
    for number, kind in FORMATS.items():
        assert (kind.weights, kind.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        assert kind.name == gguf.GGMLQuantizationType(number).name


def test_a_large_tensor_dequantises_in_chunks_to_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (13, 5 * 34), dtype=np.uint8)
    whole = dequantise(FORMATS[8], rows)
    monkeypatch.setattr("models.formats.ggml.CHUNK_WEIGHTS", 96)
    np.testing.assert_array_equal(dequantise(FORMATS[8], rows), whole)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_gives_its_sizes_and_tensors(tmp_path: Path, family: str, tied: bool) -> None:
    config = tiny_config(family, tied_embeddings=tied)  # type: ignore[arg-type]
    tensors = random_tensors(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", config, tensors))
    interleaved = family in ("llama", "mistral")
    assert checkpoint.config.rope_interleaved is interleaved
    assert checkpoint.config.family == ("llama" if interleaved else family)
    assert checkpoint.config.tied_embeddings is tied
    assert checkpoint.config.rms_eps == pytest.approx(config.rms_eps)
    for name, expected in tensors.items():
        if interleaved and name.endswith((".q", ".k")):
            expected = permuted(expected, config.heads if name.endswith("q") else config.kv_heads)  # noqa: PLW2901
        np.testing.assert_array_equal(checkpoint.tensor(name), expected, err_msg=name)
        assert checkpoint.has(name)
    assert not checkpoint.has("block.99.q")


def test_names_of_all_tensors_are_translated() -> None:
    for family in ("qwen2", "qwen3"):
        config = tiny_config(family, tied_embeddings=False)  # type: ignore[arg-type]
        for name in tensor_shapes(config):
            assert canonical_name(gguf_name(name)) == name


def test_quantised_blocks_can_be_taken_as_they_are(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", config, tensors, "Q8_0"))
    raw = checkpoint.raw("block.0.down")
    assert raw is not None
    assert (raw.format, raw.shape, raw.rows.shape) == ("Q8_0", (64, 96), (64, 96 // 32 * 34))
    np.testing.assert_array_equal(
        raw.rows, gguf.quants.quantize(tensors["block.0.down"], gguf.GGMLQuantizationType.Q8_0)
    )
    assert checkpoint.raw("final_norm").format == "F32"  # type: ignore[union-attr]


def test_what_surrounds_the_weights_is_read(tmp_path: Path) -> None:
    config = tiny_config()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", config, random_tensors(config)))
    assert (checkpoint.name, checkpoint.licence) == ("tiny", "apache-2.0")
    assert (checkpoint.bos_id, checkpoint.eos_id) == (1, 2)
    assert checkpoint.stop_ids == {0, 2}, "end of text and end of message"
    assert checkpoint.chat_template is not None and "im_start" in checkpoint.chat_template
    data = checkpoint.tokenizer_data
    assert data is not None and data.tokens == vocabulary_tokens()  # type: ignore[union-attr]
    assert [data.types[at] for at in range(len(SPECIALS) + 1)] == [3, 3, 3, 1]  # type: ignore[union-attr]


def test_rope_factors_come_from_their_tensor(tmp_path: Path) -> None:
    factors = (1.0, 1.0, 1.5, 2.0, 3.0, 8.0, 8.0, 8.0)
    config = tiny_config(rope_factors=factors)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", config, random_tensors(config)))
    assert checkpoint.config.rope_factors == factors


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(blocks=1)
    path, cache = tmp_path / "a.gguf", tmp_path / "cache"
    write_gguf(path, config, random_tensors(config))
    first = open_checkpoint(path, cache).digest
    hashed: list[Path] = []
    monkeypatch.setattr("models.cache.hash_file", lambda path: hashed.append(path) or "sha256:other")
    assert open_checkpoint(path, cache).digest == first
    assert hashed == []
    write_gguf(path, config, random_tensors(config, seed=1))
    assert open_checkpoint(path, cache).digest == "sha256:other"
    for note in (cache / "digests").iterdir():
        note.write_bytes(b"{damaged")
    assert open_checkpoint(path, cache).digest == "sha256:other"
    assert len(hashed) == 2


def test_a_file_cut_anywhere_is_refused_with_its_name(tiny_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    step = max(1, len(tiny_bytes) // 150)
    for length in [*range(64), *range(64, len(tiny_bytes), step), len(tiny_bytes) - 1]:
        path.write_bytes(tiny_bytes[:length])
        with pytest.raises(CorruptData) as caught:
            open_checkpoint(path)
        assert "cut.gguf" in caught.value.message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_header_never_gives_anything_but_an_error_of_ours(
    tiny_bytes: bytes, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(tiny_bytes)
    for at, value in changes:
        damaged[at] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.tensor("embedding")
    except EdgelamError:
        pass


@pytest.mark.parametrize(
    ("at", "form", "value", "error", "says"),
    [
        (0, "4s", b"GGML", CorruptData, "not a GGUF file"),
        (4, "<I", 1, Refused, "version 1"),
        (4, ">I", 3, Refused, "big-endian"),
        (8, "<Q", 1 << 60, CorruptData, "tensors"),
        (16, "<Q", 1 << 40, CorruptData, "keys"),
        (24, "<Q", 1 << 62, CorruptData, "a key of"),
    ],
)
def test_a_header_that_lies_is_named(
    tiny_bytes: bytes, tmp_path: Path, at: int, form: str, value: object, error: type[EdgelamError], says: str
) -> None:
    damaged = bytearray(tiny_bytes)
    struct.pack_into(form, damaged, at, value)
    path = tmp_path / "lie.gguf"
    path.write_bytes(damaged)
    with pytest.raises(error, match=says):
        open_gguf(path)


def test_an_array_longer_than_the_file_costs_no_memory(tmp_path: Path) -> None:
    key = b"some.key"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path = tmp_path / "array.gguf"
    for element in (0, 4, 8, 10):
        path.write_bytes(head + struct.pack("<IIQ", 9, element, 1 << 50) + bytes(64))
        with pytest.raises(CorruptData, match=r"some\.key"):
            open_gguf(path)
    path.write_bytes(head + struct.pack("<IIQ", 9, 9, 1) + bytes(64))
    with pytest.raises(Refused, match="array of arrays"):
        open_gguf(path)


def test_an_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="'gemma3' is not supported") as caught:
        open_checkpoint(_with_keys(tmp_path / "a.gguf", "gemma3"))
    assert "Llama" in caught.value.try_


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="one of 3 parts"):
        open_checkpoint(_with_keys(tmp_path / "a.gguf", split__count=3))


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="mixture of experts"):
        open_checkpoint(_with_keys(tmp_path / "a.gguf", llama__expert_count=8))


def test_an_unsupported_number_format_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor(
        "token_embd.weight", np.zeros((4, 256 // 256 * 66), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Refused, match="IQ2_XXS") as caught:
        open_checkpoint(tmp_path / "a.gguf")
    assert "Q4_K" in caught.value.try_


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors["block.2.v"]
    with pytest.raises(CorruptData, match=r"block\.2\.v is missing"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", config, tensors))


def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    config = tiny_config(family="qwen2")
    tensors = random_tensors(config)
    del tensors["block.0.q_bias"]
    with pytest.raises(Refused, match=r"block\.0\.k_bias is not part"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", config, tensors))


def test_a_file_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    for name in ("no.gguf", "no"):
        with pytest.raises(UsageError, match="no such file"):
            open_checkpoint(tmp_path / name)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="not a checkpoint by its name"):
        open_checkpoint(tmp_path / "weights.bin")
