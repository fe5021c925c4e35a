"""Products that are timed are products: right results, graphs that others read, and the work of a module counted."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from models.build.kit import build_kit
from models.build.quantise import BLOCK, blocks_in
from models.build.stage import OPSET
from models.engine import products
from models.engine.manifest import read_manifest
from models.engine.work import CODES_PER_BLOCK, work_of
from tests.models.tiny import tiny_config

CONFIG = tiny_config()


def test_a_float_product_is_right() -> None:
    made = products.Product("f32", 1)
    made.run()
    assert np.allclose(made.result, made.given @ made.weights["w"], atol=1e-2)


def test_a_product_of_codes_is_right_within_its_rounding() -> None:
    made = products.Product("int4", 1)
    made.run()
    codes = made.weights["w"]
    values = np.stack([codes & 0xF, codes >> 4], -1).reshape(products.SIDE, products.SIDE).astype(np.float32) - 8
    right = made.given @ (values * 0.01).T
    assert np.abs(made.result - right).max() < 0.03 * np.abs(right).max()


@pytest.mark.parametrize("name", products.NAMES)
def test_the_graphs_are_onnx(name: str) -> None:
    model = onnx.ModelProto.FromString(products.graph(name))
    assert [entry.version for entry in model.opset_import] == [OPSET, 1]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    assert {one.name for one in model.graph.initializer} == set(products.Product(name, 1).weights)


def test_a_block_of_codes_is_as_the_packer_has_it() -> None:
    assert BLOCK == CODES_PER_BLOCK == products.BLOCK


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
def test_the_work_of_a_block_and_a_head_is_counted_for_one_of_them(precision: str) -> None:
    entries = {entry.kind: entry for entry in build_kit(CONFIG, precision, "f32")}
    one, deep = (
        work_of(read_manifest(entries["block"].graphs[stack], "x")) for stack in sorted(entries["block"].graphs)
    )
    assert one == deep
    head = work_of(read_manifest(entries["head"].graphs[1], "x"))
    columns = CONFIG.hidden if precision == "f32" else blocks_in(CONFIG.hidden) * BLOCK
    assert head.row_operations == 2 * CONFIG.vocabulary * columns
    matrices = CONFIG.hidden * (CONFIG.q_width + 2 * CONFIG.kv_width + CONFIG.q_width + 3 * CONFIG.ffn)
    assert one.row_operations >= 2 * matrices
    assert one.weight_bytes >= matrices * {"f32": 4, "int8": 1, "int4": 0.5}[precision]
