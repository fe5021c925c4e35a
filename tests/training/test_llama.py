"""A trained stage computes what the reference engine does, and its gradients are those of the dense matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.engine.manifest import load_graph  # noqa: E402
from models.engine.memory import map_weights  # noqa: E402
from models.families.config import Family  # noqa: E402
from models.lora.adapter import MATRICES, AdapterSpec, from_peft, initial, shapes, to_peft  # noqa: E402
from models.training.llama import IGNORED, TrainedStage  # noqa: E402
from tests.models.stages import packed_tiny, spec_of, stage_files  # noqa: E402

pytestmark = pytest.mark.torch

SPEC = AdapterSpec(rank=3, alpha=6.0, matrices=MATRICES, seed=4)


def factors_of(config, spec=SPEC, seed: int = 1):
    """Both factors not zero, small."""
    rng = np.random.default_rng(seed)
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes(config, spec).items()}


def stage(packed, folder: Path, first: int, end: int, factors, spec=SPEC) -> TrainedStage:
    ordered = spec_of(packed, first, end)
    path, files = stage_files(packed, folder, ordered)
    _, manifest = load_graph(path, ordered)
    weights = map_weights(manifest.weights, files)
    return TrainedStage(manifest, weights.tensors, spec, factors, ordered.context_tokens)


def batch(packed, rows: int = 3, length: int = 9, seed: int = 0):
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, packed.graph.vocabulary, (rows, length)))
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    targets[0, :4] = IGNORED
    return ids, targets


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_without_an_adapter_it_says_what_the_engine_says(family: Family, precision: str, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, family, precision, "f32")
    whole = stage(packed, tmp_path, 0, packed.graph.blocks, initial(packed.config, SPEC))
    ids, _ = batch(packed, rows=1)
    with torch.no_grad():
        logits = whole.logits(whole.run(whole.embedded(ids)))[0].numpy()
    from models.engine.torch import TorchStage

    ordered = spec_of(packed, 0, packed.graph.blocks)
    path, files = stage_files(packed, tmp_path, ordered)
    engine = TorchStage.load(path, files, ordered)
    slot = engine.open()
    expected = engine.step(slot, ids[0].numpy(), 0, logits_rows=ids.shape[1])
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("as_gguf", [False, True])
def test_gradients_are_those_of_dense_matrices(as_gguf: bool, tmp_path: Path) -> None:
    """d loss / d A = s B^T G and d loss / d B = s G A^T, with G that of the whole matrix by plain torch."""
    packed = packed_tiny(tmp_path, as_gguf=as_gguf)
    factors = factors_of(packed.config)
    mine = stage(packed, tmp_path, 0, packed.graph.blocks, factors)
    ids, targets = batch(packed)
    mine.loss(mine.run(mine.embedded(ids)), targets).backward()

    dense = stage(packed, tmp_path, 0, packed.graph.blocks, {})
    leaves = {}
    for name, matrix in dense._matrices.items():
        parts = ("q", "k", "v") if name.endswith("qkv") else (name.rsplit(".", 1)[1],)
        prefix = name.rsplit(".", 1)[0]
        added = [SPEC.scale * factors[f"{prefix}.{part}.b"] @ factors[f"{prefix}.{part}.a"] for part in parts]
        leaf = (matrix.rows() + torch.from_numpy(np.concatenate(added))).requires_grad_()
        leaves[name] = leaf
        matrix.rows = lambda wanted=slice(None), leaf=leaf: leaf[wanted]  # type: ignore[method-assign]
    import models.training.llama as module

    plain, module.product = module.product, lambda given, matrix: given @ matrix.rows().T
    try:
        dense.loss(dense.run(dense.embedded(ids)), targets).backward()
    finally:
        module.product = plain
    for name, leaf in leaves.items():
        prefix, matrix = name.rsplit(".", 1)
        config = packed.config
        heights = [config.q_width, config.kv_width, config.kv_width] if matrix == "qkv" else [leaf.shape[0]]
        for part, gradient in zip(
            ("q", "k", "v") if matrix == "qkv" else (matrix,), leaf.grad.split(heights), strict=True
        ):
            a, b = (torch.from_numpy(factors[f"{prefix}.{part}.{side}"]) for side in "ab")
            torch.testing.assert_close(
                mine.factors[f"{prefix}.{part}.a"].grad, SPEC.scale * b.T @ gradient, atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(
                mine.factors[f"{prefix}.{part}.b"].grad, SPEC.scale * gradient @ a.T, atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("cut", [1, 2])
def test_a_cut_changes_no_gradient(cut: int, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path)
    factors = factors_of(packed.config)
    ids, targets = batch(packed)
    whole = stage(packed, tmp_path, 0, packed.graph.blocks, factors)
    loss = whole.loss(whole.run(whole.embedded(ids)), targets)
    loss.backward()
    front, back = stage(packed, tmp_path, 0, cut, factors), stage(packed, tmp_path, cut, packed.graph.blocks, factors)
    sent = front.run(front.embedded(ids), remember=False)
    received = sent.detach().requires_grad_()
    again = back.loss(back.run(received), targets)
    again.backward()
    sent.backward(received.grad)
    assert float(again.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, factor in whole.factors.items():
        other = (front if name in front.factors else back).factors[name]
        torch.testing.assert_close(other.grad, factor.grad, atol=1e-6, rtol=1e-5)


def test_what_is_frozen_gets_no_gradient(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path)
    one = stage(packed, tmp_path, 0, packed.graph.blocks, factors_of(packed.config))
    one.train_only(("b",))
    ids, targets = batch(packed)
    one.loss(one.run(one.embedded(ids)), targets).backward()
    assert all((factor.grad is None) == name.endswith(".a") for name, factor in one.factors.items())


@pytest.mark.parametrize("as_gguf", [False, True])
def test_an_adapter_in_peft_layout_does_the_same_to_hugging_face_matrices(as_gguf: bool, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, as_gguf=as_gguf)
    factors = factors_of(packed.config)
    files = dict(to_peft(packed.config, factors))
    assert sorted(files)[0] == "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    back = from_peft(packed.config, files)
    assert back.keys() == factors.keys() and all((back[name] == factors[name]).all() for name in factors)
    plain = dict(to_peft(packed_tiny(tmp_path / "hf").config, factors))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert (files[name] == plain[name]).all() is np.bool_(not packed.config.rope_interleaved)


def test_the_loss_falls(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, precision="int4")
    one = stage(packed, tmp_path, 0, packed.graph.blocks, initial(packed.config, SPEC))
    optimiser = torch.optim.AdamW(one.factors.values(), lr=1e-2)
    ids, targets = batch(packed)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = one.loss(one.run(one.embedded(ids), remember=False), targets)
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
