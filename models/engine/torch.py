"""Stages on torch, float32: the reference that other engines are compared with, and the ground for training.

Written for plainness, not speed. Takes the same graph file and weights as `models.engine.onnx`; 4 and 8 bit weights are
expanded to float32 at load. The residual stream takes the wire dtype at every block boundary here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.build.layout import MATRICES, head_matrix, matrix_size, table_precision
from models.build.quantise import Quantised, blocks_in, dequantise
from models.engine.base import Array, ContextFull, EngineFailed, NoSlot, StageSpec
from models.engine.manifest import Precision, StageManifest, load_graph
from models.engine.memory import map_weights, rope_tables

_WIRE_TYPES: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class TorchStage:
    """A stage as torch tensors on the CPU. See `models.engine.base.StageEngine`."""

    def __init__(self, manifest: StageManifest, tensors: dict[str, Tensor], spec: StageSpec) -> None:
        """`tensors` as `expanded` gives them."""
        self._manifest = manifest
        self._tensors = tensors
        self._spec = spec
        cosines, sines = rope_tables(manifest.config, spec.context_tokens)
        self._cosines, self._sines = torch.from_numpy(cosines), torch.from_numpy(sines)
        self._slots: list[_Slot | None] = [None] * spec.slots

    @classmethod
    def load(cls, graph_path: Path, weight_paths: Iterable[Path], spec: StageSpec) -> TorchStage:
        """Load a stage; raises EngineFailed, CorruptData and Refused like OnnxStage.load."""
        _, manifest = load_graph(graph_path, spec)
        manifest.config.check_context(spec.context_tokens)
        weights = map_weights(manifest, weight_paths)
        torch.set_num_threads(spec.threads)
        return cls(manifest, expanded(manifest, weights.tensors), spec)

    @property
    def name(self) -> str:
        return f"torch {torch.__version__} cpu"

    @property
    def held_bytes(self) -> int:
        held = [*self._tensors.values(), self._cosines, self._sines]
        for slot in self._slots:
            if slot is not None:
                held += [*slot.keys, *slot.values]
        return sum(tensor.nbytes for tensor in held)

    def open(self) -> int:
        for number, slot in enumerate(self._slots):
            if slot is None:
                self._slots[number] = _Slot(self._manifest, self._spec.context_tokens)
                return number
        raise NoSlot(f"all {self._spec.slots} slots are taken", try_="try again when a request has ended")

    def close(self, slot: int) -> None:
        self._opened(slot)
        self._slots[slot] = None

    def row(self, slot: int) -> None:
        """None: this engine is the reference, not the fast one."""
        del slot

    @torch.no_grad()
    def step(self, slot: int, given: Array, position: int) -> Array:
        opened = self._opened(slot)
        end = position + given.shape[0]
        if end > self._spec.context_tokens:
            raise ContextFull(f"{end} tokens in a context of {self._spec.context_tokens}")
        if not 0 <= position <= opened.rows or given.shape[0] == 0:
            raise EngineFailed(f"step of {given.shape[0]} rows at position {position} after {opened.rows} rows")
        residual = self._given(given)
        opened.rows = position
        for at, index in enumerate(self._manifest.blocks):
            residual = self._rounded(
                self._block(f"block.{index}.", residual, opened.keys[at], opened.values[at], position)
            )
        if not torch.isfinite(residual).all():
            raise EngineFailed(
                f"hidden states left the range of {self._spec.wire_dtype}", try_="deploy with wire dtype bf16"
            )
        opened.rows = end
        if not self._manifest.head:
            return self._wire_array(residual)
        logits = self._norm(residual[-1], "final_norm") @ self._tensors[head_matrix(self._manifest.config)].T
        result: Array = logits.numpy()
        return result

    def _opened(self, slot: int) -> _Slot:
        found = self._slots[slot] if 0 <= slot < len(self._slots) else None
        if found is None:
            raise EngineFailed(f"slot {slot} is not open")
        return found

    def _given(self, given: Array) -> Tensor:
        """Token ids or hidden states in wire dtype -> float32 [n, hidden]."""
        if self._manifest.embedding:
            ids = torch.from_numpy(given.astype(np.int64))
            if int(ids.min()) < 0 or int(ids.max()) >= self._spec.vocabulary:
                raise EngineFailed(f"token ids {int(ids.min())} to {int(ids.max())} in {self._spec.vocabulary}")
            return self._rounded(self._tensors["embedding"][ids])
        values = torch.from_numpy(np.ascontiguousarray(given))
        return (values.view(torch.bfloat16) if self._spec.wire_dtype == "bf16" else values).float()

    def _rounded(self, residual: Tensor) -> Tensor:
        return residual.to(_WIRE_TYPES[self._spec.wire_dtype]).float()

    def _wire_array(self, residual: Tensor) -> Array:
        wire = residual.to(_WIRE_TYPES[self._spec.wire_dtype])
        array: Array = wire.view(torch.int16).numpy().view(np.uint16) if wire.dtype == torch.bfloat16 else wire.numpy()
        return array

    def _block(self, prefix: str, before: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """Run one block over [n, hidden]; `keys` and `values` [kv_heads, context, head_dim] take the new rows."""
        attended = self._attention(prefix, self._norm(before, f"{prefix}attention_norm"), keys, values, position)
        middle = before + attended @ self._tensors[f"{prefix}o"].T
        normed = self._norm(middle, f"{prefix}ffn_norm")
        gate = functional.silu(normed @ self._tensors[f"{prefix}gate"].T)
        return middle + (gate * (normed @ self._tensors[f"{prefix}up"].T)) @ self._tensors[f"{prefix}down"].T

    def _attention(self, prefix: str, normed: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        config = self._manifest.config
        rows = normed.shape[0]
        end = position + rows
        stacked = normed @ self._tensors[f"{prefix}qkv"].T
        if config.qkv_bias:
            stacked = stacked + self._tensors[f"{prefix}qkv_bias"]
        ends = [config.q_width, config.q_width + config.kv_width]
        query, key, value = (
            part.view(rows, -1, config.head_dim).transpose(0, 1) for part in stacked.tensor_split(ends, dim=-1)
        )
        if config.qk_norm:
            query, key = self._norm(query, f"{prefix}q_norm"), self._norm(key, f"{prefix}k_norm")
        keys[:, position:end] = self._rotated(key, position)
        values[:, position:end] = value
        mask = torch.ones(rows, end, dtype=torch.bool).tril(position)
        shared = config.heads // config.kv_heads
        attended = functional.scaled_dot_product_attention(
            self._rotated(query, position)[None],
            keys[None, :, :end].repeat_interleave(shared, dim=1),
            values[None, :, :end].repeat_interleave(shared, dim=1),
            attn_mask=mask,
        )
        return attended[0].transpose(0, 1).reshape(rows, config.q_width)

    def _rotated(self, heads: Tensor, position: int) -> Tensor:
        """Turn each pair of dimensions of [heads, n, head_dim] by its position's angle."""
        rows = slice(position, position + heads.shape[1])
        cosines, sines = self._cosines[rows], self._sines[rows]
        if self._manifest.config.rope_interleaved:
            first, second = heads[..., 0::2], heads[..., 1::2]
            turned = (first * cosines - second * sines, first * sines + second * cosines)
            return torch.stack(turned, dim=-1).flatten(-2)
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cosines - second * sines, first * sines + second * cosines), dim=-1)

    def _norm(self, values: Tensor, weight: str) -> Tensor:
        scale = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + self._manifest.config.rms_eps)
        return values * scale * self._tensors[weight]


class _Slot:
    """One request's keys and values, by block of the stage: [kv_heads, context, head_dim] each."""

    def __init__(self, manifest: StageManifest, context_tokens: int) -> None:
        shape = (manifest.config.kv_heads, context_tokens, manifest.config.head_dim)
        self.keys = [torch.zeros(shape) for _ in manifest.blocks]
        self.values = [torch.zeros(shape) for _ in manifest.blocks]
        self.rows = 0


def expanded(manifest: StageManifest, stored: Mapping[str, Array]) -> dict[str, Tensor]:
    """Give a stage's weights in float32: matrices [out, in] by their bare names, norms and biases by their own."""
    config, tensors = manifest.config, {}
    matrices = {f"block.{index}.{name}": name for index in manifest.blocks for name in MATRICES}
    precisions: dict[str, Precision] = dict.fromkeys(matrices, manifest.precision)
    for table in ([head_matrix(config)] if manifest.head else []) + (["embedding"] if manifest.embedding else []):
        matrices[table] = table
        precisions[table] = table_precision(manifest.precision)
    for name, kind in matrices.items():
        out, columns = matrix_size(config, kind)
        tensors[name] = torch.from_numpy(_matrix(stored, name, out, columns, precisions[name]))
        if precisions[name] == "f32" and kind in MATRICES:
            tensors[name] = tensors[name].T
    for info in manifest.weights:
        if info.name.endswith(("norm", "bias")):
            tensors[info.name] = torch.from_numpy(np.array(stored[info.name], np.float32))
    return tensors


def _matrix(
    stored: Mapping[str, Array], name: str, out: int, columns: int, precision: Precision
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    weight = stored[f"{name}.weight"]
    if precision == "f32":
        return np.array(weight, np.float32)  # a copy: torch wants memory that may be written
    zeros = stored.get(f"{name}.zero_points")
    codes = Quantised(
        data=weight.astype(np.uint8, copy=False),
        scales=stored[f"{name}.scales"].astype(np.float32, copy=False).reshape(out, blocks_in(columns)),
        zero_points=None if zeros is None else zeros.astype(np.uint8, copy=False).reshape(out, -1),
    )
    return np.array(dequantise(codes, columns), np.float32)
