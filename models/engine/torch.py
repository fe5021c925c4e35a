"""Stages on torch, float32: the reference that other engines are compared with, and the ground for training.

Written for plainness, not speed. Takes the same graph file and weights as `models.engine.onnx`; 4 and 8 bit weights are
expanded to float32 at load. The residual stream takes the wire dtype at every block boundary here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.build.layout import MATRICES, head_matrix
from models.engine.base import Array, ContextFull, EngineFailed, NoSlot, StageSpec, without_adapters
from models.engine.expand import expanded as floats
from models.engine.manifest import StageManifest, load_graph
from models.engine.memory import made_weights, map_weights, rope_tables
from wire.errors import EdgelamError

BLOCK_MATRICES: Final = tuple(f".{name}" for name in MATRICES)
"""Ends of the names of matrices that are stored [in, out]."""

MAX_SAID_LETTERS: Final = 300

_WIRE_TYPES: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class TorchStage:
    """A stage as torch tensors on one device. See `models.engine.base.StageEngine`."""

    def __init__(
        self, manifest: StageManifest, tensors: dict[str, Tensor], spec: StageSpec, device: str = "cpu"
    ) -> None:
        """`tensors` as `expanded` gives them; moved to the device. Raises EngineFailed if that can't be."""
        self._manifest = manifest
        self._spec = spec
        self._device = device
        cosines, sines = rope_tables(manifest.config, spec.context_tokens)
        with _failing(device):
            self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            self._cosines = torch.from_numpy(cosines).to(device)
            self._sines = torch.from_numpy(sines).to(device)
        self._slots: list[_Slot | None] = [None] * spec.slots

    @classmethod
    def load(cls, graph_path: Path, weight_paths: Iterable[Path], spec: StageSpec, device: str = "cpu") -> TorchStage:
        """Load a stage; raises EngineFailed, CorruptData and Refused like OnnxStage.load."""
        _, manifest = load_graph(graph_path, spec)
        manifest.config.check_context(spec.context_tokens)
        weights = map_weights(manifest.weights, weight_paths)
        torch.set_num_threads(spec.threads)
        return cls(manifest, expanded(manifest, weights.tensors), spec, device)

    @classmethod
    def load_synthetic(cls, graph_path: Path, spec: StageSpec, seed: int, device: str = "cpu") -> TorchStage:
        """Load a graph with weights made up here, for measuring."""
        _, manifest = load_graph(graph_path, spec)
        weights = made_weights(manifest.weights, graph_path.parent, seed)
        torch.set_num_threads(spec.threads)
        return cls(manifest, expanded(manifest, weights.tensors), spec, device)

    @property
    def name(self) -> str:
        on = torch.cuda.get_device_name() if self._device == "cuda" else self._device
        return f"torch {torch.__version__} {on}"

    @property
    def held_bytes(self) -> int:
        held = [*self._tensors.values(), self._cosines, self._sines]
        for slot in self._slots:
            if slot is not None:
                held += [*slot.keys, *slot.values]
        return sum(tensor.nbytes for tensor in held)

    @property
    def idle_bytes(self) -> int:
        """Nothing: a slot's tensors come when it is opened."""
        return 0

    def open(self, adapter: str = "") -> int:
        without_adapters(adapter)
        for number, slot in enumerate(self._slots):
            if slot is None:
                with _failing(self._device):
                    self._slots[number] = _Slot(self._manifest, self._spec.context_tokens, self._device)
                return number
        raise NoSlot(f"all {self._spec.slots} slots are taken", try_="try again when a request has ended")

    def close(self, slot: int) -> None:
        self._opened(slot)
        self._slots[slot] = None

    def step_many(
        self, slots: Sequence[int], given: Array, positions: Sequence[int]
    ) -> tuple[Array, dict[int, EdgelamError]]:
        """One after the other."""
        results: list[Array | None] = []
        failed: dict[int, EdgelamError] = {}
        for index, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            try:
                results.append(self.step(slot, given[index : index + 1], position).reshape(-1))
            except (ContextFull, EngineFailed) as error:
                failed[index] = error
                results.append(None)
        made = next((result for result in results if result is not None), np.zeros(self._spec.hidden, np.float32))
        return np.stack([np.zeros_like(made) if result is None else result for result in results]), failed

    def row(self, slot: int) -> None:
        """None: this engine is the reference, not the fast one."""
        del slot

    def step(self, slot: int, given: Array, position: int, logits_rows: int = 1) -> Array:
        with torch.no_grad(), _failing(self._device):
            return self._step(slot, given, position, logits_rows)

    def _step(self, slot: int, given: Array, position: int, logits_rows: int) -> Array:
        opened = self._opened(slot)
        end = position + given.shape[0]
        if end > self._spec.context_tokens:
            raise ContextFull(f"{end} tokens in a context of {self._spec.context_tokens}")
        if not 0 <= position <= opened.rows or not 1 <= logits_rows <= given.shape[0]:
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
        last = residual[-1] if logits_rows == 1 else residual[-logits_rows:]
        logits = self._norm(last, "final_norm") @ self._tensors[head_matrix(self._manifest.config)].T
        result: Array = logits.cpu().numpy()
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
            return self._rounded(self._tensors["embedding"][ids.to(self._device)])
        values = torch.from_numpy(np.array(given, order="C")).to(self._device)
        return (values.view(torch.bfloat16) if self._spec.wire_dtype == "bf16" else values).float()

    def _rounded(self, residual: Tensor) -> Tensor:
        return residual.to(_WIRE_TYPES[self._spec.wire_dtype]).float()

    def _wire_array(self, residual: Tensor) -> Array:
        wire = residual.to(_WIRE_TYPES[self._spec.wire_dtype]).cpu()
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
        mask = torch.ones(rows, end, dtype=torch.bool, device=self._device).tril(position)
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
        return turned(heads, self._cosines[rows], self._sines[rows], self._manifest.config.rope_interleaved)

    def _norm(self, values: Tensor, weight: str) -> Tensor:
        return rms_norm(values, self._tensors[weight], self._manifest.config.rms_eps)


def turned(heads: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair of dimensions of [..., n, head_dim] by its position's angle, of [n, head_dim / 2] (Su et al.,
    RoFormer, 2021): neighbours where `interleaved`, else those half a head apart."""
    if interleaved:
        first, second = heads[..., 0::2], heads[..., 1::2]
        pairs = (first * cosines - second * sines, first * sines + second * cosines)
        return torch.stack(pairs, dim=-1).flatten(-2)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, first * sines + second * cosines), dim=-1)


def rms_norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Over the last dimension (Zhang and Sennrich, Root Mean Square Layer Normalization, 2019)."""
    return values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + epsilon) * weight


class _Slot:
    """One request's keys and values, by block of the stage: [kv_heads, context, head_dim] each."""

    def __init__(self, manifest: StageManifest, context_tokens: int, device: str) -> None:
        shape = (manifest.config.kv_heads, context_tokens, manifest.config.head_dim)
        self.keys = [torch.zeros(shape, device=device) for _ in manifest.blocks]
        self.values = [torch.zeros(shape, device=device) for _ in manifest.blocks]
        self.rows = 0


@contextmanager
def _failing(device: str) -> Iterator[None]:
    """What torch refuses on a device is the engine's failure: no memory, no kernel for this GPU, no GPU at all."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise EngineFailed(f"torch {torch.__version__} {device}: {str(error)[:MAX_SAID_LETTERS]}") from error


def expanded(manifest: StageManifest, stored: Mapping[str, Array]) -> dict[str, Tensor]:
    """Give a stage's weights in float32: matrices [out, in] by their bare names, norms and biases by their own."""
    tensors = {name: torch.from_numpy(values) for name, values in floats(manifest, stored)}
    return {name: tensor.T if name.endswith(BLOCK_MATRICES) else tensor for name, tensor in tensors.items()}
