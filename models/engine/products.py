"""Products of matrices in onnxruntime, to see what it makes of the processor: the ceiling of prefill.

128 rows by a square matrix: in float32, and as 4 bit codes with activations rounded to 8 bit, as stages multiply
(models.build.stage). A board has no ONNX library, so the two graphs of one node each are written here field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from models.engine.base import Array
from models.engine.manifest import WEIGHTS_LOCATION
from models.engine.session import Session, value

ROWS: Final = 128
SIDE: Final = 1024
BLOCK: Final = 32
"""Codes with one scale, as in models.build.quantise, which needs what boards don't have."""
OPERATIONS: Final = 2 * ROWS * SIDE * SIDE
"""A multiplication and an addition for each weight and row."""
NAMES: Final = ("f32", "int4")

_FLOAT: Final = 1
_UINT8: Final = 2
_IR_VERSION: Final = 10
_OPSET: Final = 18
_CONTRIB: Final = "com.microsoft"
_ATTRIBUTE_INT: Final = 2
_EXTERNAL: Final = 1


class Product:
    """`run` multiplies once. Raises EngineFailed."""

    def __init__(self, name: str, threads: int) -> None:
        weights = _weights(name)
        self._session = Session(graph(name), weights, threads, f"product of {name} matrices")
        self.engine = self._session.name
        self.given: Array = np.random.default_rng(1).standard_normal((ROWS, SIDE), np.float32)
        self.result: Array = np.zeros((ROWS, SIDE), np.float32)
        self.weights = weights
        self._binding = self._session.binding()
        self._values = value(self.given), value(self.result)
        self._binding.bind_ortvalue_input("x", self._values[0])
        self._binding.bind_ortvalue_output("y", self._values[1])

    def run(self) -> None:
        self._session.run(self._binding)


def _weights(name: str) -> dict[str, Array]:
    generator = np.random.default_rng(2)
    if name == "f32":
        return {"w": generator.standard_normal((SIDE, SIDE), np.float32)}
    blocks = SIDE // BLOCK
    return {
        "w": generator.integers(0, 256, (SIDE, blocks, BLOCK // 2), np.uint8),
        "s": np.full(SIDE * blocks, 0.01, np.float32),
    }


def graph(name: str) -> bytes:
    """The ONNX model of a product."""
    weights = _weights(name)
    if name == "f32":
        node = _node("MatMul", ("x", "w"), "", {})
    else:
        sizes = {"K": SIDE, "N": SIDE, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        node = _node("MatMulNBits", ("x", "w", "s"), _CONTRIB, sizes)
    inside = [_bytes(1, node), _bytes(2, b"product")]
    inside += [_bytes(5, _initializer(label, tensor)) for label, tensor in weights.items()]
    inside += [_bytes(11, _matrix("x")), _bytes(12, _matrix("y"))]
    opsets = [_bytes(8, _bytes(1, domain.encode()) + _whole(2, at)) for domain, at in (("", _OPSET), (_CONTRIB, 1))]
    return _whole(1, _IR_VERSION) + _bytes(7, b"".join(inside)) + b"".join(opsets)


def _node(operator: str, inputs: tuple[str, ...], domain: str, attributes: Mapping[str, int]) -> bytes:
    said = [_bytes(1, name.encode()) for name in inputs] + [_bytes(2, b"y"), _bytes(4, operator.encode())]
    said += [
        _bytes(5, _bytes(1, name.encode()) + _whole(3, number) + _whole(20, _ATTRIBUTE_INT))
        for name, number in attributes.items()
    ]
    return b"".join([*said, _bytes(7, domain.encode())])


def _initializer(name: str, tensor: Array) -> bytes:
    """Declared as external data: the session is given the arrays."""
    dtype = _FLOAT if tensor.dtype == np.float32 else _UINT8
    dims = b"".join(_whole(1, dim) for dim in tensor.shape)
    where = _bytes(13, _bytes(1, b"location") + _bytes(2, WEIGHTS_LOCATION.encode()))
    return dims + _whole(2, dtype) + _bytes(8, name.encode()) + where + _whole(14, _EXTERNAL)


def _matrix(name: str) -> bytes:
    dims = b"".join(_bytes(1, _whole(1, dim)) for dim in (ROWS, SIDE))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _whole(1, _FLOAT) + _bytes(2, dims)))


def _whole(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    said = bytearray()
    while number > 0x7F:
        said.append(number & 0x7F | 0x80)
        number >>= 7
    said.append(number)
    return bytes(said)
