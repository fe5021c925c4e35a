"""Quantised blocks stand for the weights they were made from, in the layout that onnxruntime's kernels read."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.build.quantise import BLOCK, Quantised, dequantise, quantise_4bit, quantise_8bit


def normal(out: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, columns), np.float32)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def test_8_bit_carries_q8_0_bit_by_bit() -> None:
    """Q8_0 is a half-precision scale times whole numbers up to 127."""
    draw = np.random.default_rng(1)
    codes = draw.integers(-127, 128, (64, 6, BLOCK)).astype(np.float32)
    codes[..., 0] = 127
    scales = draw.uniform(1e-4, 1e-2, (64, 6, 1)).astype(np.float16).astype(np.float32)
    weight = (codes * scales).reshape(64, -1)
    np.testing.assert_array_equal(dequantise(quantise_8bit(weight), weight.shape[1]), weight)


@pytest.mark.parametrize(("quantise", "most"), [(quantise_8bit, 0.007), (quantise_4bit, 0.085)])
def test_error_on_normal_weights_is_what_the_bits_allow(quantise: object, most: float) -> None:
    weight = normal(128, 320)
    assert relative_error(dequantise(quantise(weight), 320), weight) < most  # type: ignore[operator]


def test_4_bit_is_never_worse_than_rounding_to_the_range_of_the_block() -> None:
    weight = normal(256, 320, 2)
    rows = weight.reshape(-1, BLOCK)
    least, most = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    step = ((most - least) / 15)[:, None]
    zero = np.rint(-least[:, None] / step)
    plain = (np.clip(np.rint(rows / step) + zero, 0, 15) - zero) * step
    ours = dequantise(quantise_4bit(weight), 320).reshape(-1, BLOCK)
    errors, plain_errors = (np.square(found - rows).sum(axis=1) for found in (ours, plain))
    assert (errors <= plain_errors * (1 + 1e-4)).all()
    assert errors.sum() < 0.96 * plain_errors.sum()


def test_4_bit_finds_a_grid_with_a_whole_zero_point_exactly() -> None:
    draw = np.random.default_rng(5)
    codes = draw.integers(0, 16, (32, 4, BLOCK))
    codes[..., :2] = (0, 15)
    zeros, scales = draw.integers(0, 16, (32, 4, 1)), draw.uniform(0.01, 1, (32, 4, 1))
    weight = ((codes - zeros) * scales).astype(np.float32).reshape(32, -1)
    np.testing.assert_allclose(dequantise(quantise_4bit(weight), 128), weight, rtol=1e-5, atol=1e-6)


@given(out=st.integers(1, 9), columns=st.integers(1, 130), kind=st.sampled_from(["zero", "equal", "positive", "tiny"]))
@settings(max_examples=60, deadline=None)
def test_odd_sizes_and_odd_blocks_stay_finite_and_near(out: int, columns: int, kind: str) -> None:
    weight = {
        "zero": np.zeros((out, columns), np.float32),
        "equal": np.full((out, columns), -0.7, np.float32),
        "positive": np.abs(normal(out, columns)),
        "tiny": normal(out, columns) * np.float32(1e-30),
    }[kind]
    for quantise, steps in ((quantise_4bit, 15), (quantise_8bit, 127)):
        found = dequantise(quantise(weight), columns)
        assert np.isfinite(found).all()
        assert np.abs(found - weight).max() <= 2 * np.abs(weight).max() / steps + 1e-37


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 96, 100])
def test_the_kernel_reads_the_layout_as_we_write_it(bits: int, columns: int) -> None:
    """With float activations (accuracy level 1) the product is that with the expanded matrix."""
    weight = normal(24, columns, 7)
    quantised = quantise_4bit(weight) if bits == 4 else quantise_8bit(weight)
    rows = normal(3, columns, 8)
    product = run_kernel(quantised, rows, bits)
    np.testing.assert_allclose(product, rows @ dequantise(quantised, columns).T, atol=2e-4)


def run_kernel(quantised: Quantised, rows: np.ndarray, bits: int) -> np.ndarray:
    stored = {"w": quantised.data, "s": quantised.scales.reshape(-1)}
    if quantised.zero_points is not None:
        stored["z"] = quantised.zero_points.reshape(-1)
    out, columns = quantised.data.shape[0], rows.shape[1]
    attributes = {"K": columns, "N": out, "bits": bits, "block_size": BLOCK, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", **attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(rows.shape))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(rows), out])]
    held = [numpy_helper.from_array(tensor, name) for name, tensor in stored.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "product", inputs, outputs, held), opset_imports=opsets, ir_version=10
    )
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": rows})[0]
    return result
