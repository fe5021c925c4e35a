"""Models are trained where torch's default device is: nothing of them is left on the processor. A device without any
memory ('meta') stands for a GPU where there is none: like one, it refuses what is on another device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.formats.bert import MATRICES, BertFile, read_bert_config  # noqa: E402
from models.lora.adapter import AdapterSpec, shapes  # noqa: E402
from models.training import computer as computing  # noqa: E402
from models.training.computer import Computer, choose, wrong  # noqa: E402
from models.training.encoder import TrainedEncoder  # noqa: E402
from models.training.heads import TrainedHead  # noqa: E402
from models.training.looped import SUMMED  # noqa: E402
from models.training.samples import Row, batch_of  # noqa: E402
from models.training.tensors import given, taken  # noqa: E402
from tests.models.stages import packed_tiny  # noqa: E402
from tests.models.tiny_bert import write_bert  # noqa: E402
from tests.training.looped_models import Looped, shares_of  # noqa: E402
from tests.training.test_llama import factors_of, stage  # noqa: E402
from tests.training.test_rounds import made, through  # noqa: E402

pytestmark = pytest.mark.torch

ROWS = [Row(np.array(ids, np.int64), 1, label) for label, ids in enumerate([[2, 4, 5, 3], [2, 7, 8, 9, 10, 3]])]


@pytest.fixture
def elsewhere() -> Iterator[str]:
    torch.set_default_device("meta")
    yield "meta"
    torch.set_default_device(None)


def all_on(device: str, leaves: dict[str, Any]) -> bool:
    return {leaf.grad.device.type for leaf in leaves.values()} == {device}


@pytest.mark.slow
def test_what_is_left_behind_is_refused(elsewhere: str) -> None:
    here = torch.ones(2, 2, device="cpu")
    assert given(np.ones((2, 2), np.float32)).device.type == elsewhere
    with pytest.raises(RuntimeError, match="device"):
        given(np.ones((2, 2), np.float32)) * here


def test_on_the_processor_nothing_is_copied() -> None:
    values = np.ones((2, 3), np.float32)
    tensor = given(values)
    tensor[0, 0] = 5
    assert values[0, 0] == 5 and taken(tensor) is not None and np.shares_memory(taken(tensor), values)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
@pytest.mark.parametrize("remember", [True, False])
def test_a_language_model_is_trained_elsewhere(precision: str, remember: bool, tmp_path: Path, elsewhere: str) -> None:
    packed = packed_tiny(tmp_path, "qwen3", precision, "f32")
    whole = stage(packed, tmp_path, 0, packed.graph.blocks, factors_of(packed.config))
    ids = given(np.arange(12).reshape(2, 6))
    whole.logits(whole.run(whole.embedded(ids), remember=remember)).sum().backward()
    assert all_on(elsewhere, whole.factors)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [False, True])
def test_an_encoder_is_trained_elsewhere(blocks: bool, tmp_path: Path, elsewhere: str) -> None:
    config = read_bert_config(write_bert(tmp_path))
    spec = AdapterSpec(rank=2, alpha=4.0, matrices=tuple(MATRICES), seed=4, labels=3, blocks=blocks)  # type: ignore[arg-type]
    factors = {name: np.zeros(shape, np.float32) for name, shape in shapes(config, spec).items()}
    mine = TrainedEncoder(BertFile.open(config, tmp_path / "model.safetensors"), spec, factors)
    mine.loss_of(batch_of(ROWS), remember=False).backward()
    assert all_on(elsewhere, mine.factors)


@pytest.mark.slow
def test_a_task_module_is_trained_elsewhere(elsewhere: str) -> None:
    mine = TrainedHead(np.ones((4, 5), np.float32), np.zeros((3, 6), np.float32))
    mine.loss_of(batch_of([Row(np.array([number], np.int64), 1, number) for number in range(3)])).backward()
    assert all_on(elsewhere, mine.factors)


@pytest.mark.slow
def test_parts_of_a_block_are_trained_elsewhere(tmp_path: Path, elsewhere: str) -> None:
    folder, spec = write_bert(tmp_path), AdapterSpec(rank=1, alpha=1.0, seed=4, labels=3)
    looped = Looped(folder, spec, shares_of((1, 1), (8, 8)), ("a",))
    states = given(np.ones((2, 4, looped.config.hidden_size), np.float32)).requires_grad_(True)
    lengths = given(np.array([4, 2]))
    for part in SUMMED:
        parts = [shard.made(part, states, lengths) for shard in looped.shards]
        looped.hub.normed(part, looped.hub.added(part, parts, states)).sum().backward()
    assert {leaf.grad.device.type for shard in looped.shards for leaf in shard.factors.values()} == {elsewhere}


def test_a_gpu_is_taken_if_it_computes_rightly_and_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    on: list[str] = []
    monkeypatch.setattr(computing, "train_on", on.append)
    assert (choose(True, {}, tried.append) == Computer() and not tried) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Orin")
    monkeypatch.setattr(computing, "wrong", lambda _device: "")
    on.clear()
    assert choose(False, {}, tried.append) == Computer() and not on
    assert choose(True, {"torch-cuda": "it was killed"}, tried.append).fell_back == "torch-cuda: it was killed"
    assert choose(True, {}, tried.append) == Computer("Orin") and on == ["cuda"] and tried[-1] == "torch-cuda"
    monkeypatch.setattr(computing, "wrong", lambda _device: "it multiplies wrongly")
    assert choose(True, {}, tried.append) == Computer(fell_back="torch-cuda: it multiplies wrongly")

    def broken(_device: str) -> str:
        raise RuntimeError("CUDA error: no kernel image\nmore of it")

    monkeypatch.setattr(computing, "wrong", broken)
    assert choose(True, {}, tried.append) == Computer(fell_back="torch-cuda: CUDA error: no kernel image")
    assert on == ["cuda"]


def test_the_proof_is_what_the_processor_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong("cpu") == ""
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda one, other: product(one, other) + (one.dtype is torch.float32)
    )
    assert wrong("cpu") == "it multiplies wrongly"


@pytest.mark.board
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_a_round_comes_to_what_the_processor_comes_to(tmp_path: Path) -> None:
    """To rounding, and twice to the same bits."""
    expected = through(made(tmp_path / "cpu")[0])
    from models.training.tensors import train_on

    try:
        train_on("cuda")
        one, other = through(made(tmp_path / "one")[0]), through(made(tmp_path / "other")[0])
    finally:
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, expected, atol=1e-3)
