"""The Llama family in torch for training: whole sequences, gradients of low-rank factors, frozen weights as packed.

Frozen matrices stay quantised and are expanded for one product at a time, forwards and again backwards, so that a
worker holds little more than the packed model (QLoRA's idea, arXiv 2305.14314, with our own codes). The residual stream
is float32 throughout: gradients want more than the wire dtype has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.build.layout import MATRICES, head_matrix, table_precision
from models.build.quantise import BLOCK, ZERO_POINT_8BIT, blocks_in
from models.engine.base import Array
from models.engine.manifest import Precision, StageManifest
from models.engine.memory import rope_tables
from models.engine.torch import rms_norm, turned
from models.families.config import matrix_size
from models.lora.adapter import AdapterSpec
from models.training.factored import Factored, mapped, trained
from models.training.samples import IGNORED, Batch, Judged
from models.training.tensors import given

PIECE_ELEMENTS: Final = 1 << 22
"""Of a packed matrix that are expanded at one time: the table of a vocabulary would take more than the model."""


class Frozen:
    """A matrix [out, in] that is not trained, in the form that it is packed in."""

    def __init__(self, stored: Mapping[str, Array], name: str, out: int, columns: int, precision: Precision) -> None:
        self.out, self._columns = out, columns
        weight = mapped(stored[f"{name}.weight"])
        self._whole: Tensor | None = None
        if precision == "f32":
            self._whole = weight.T if weight.shape == (columns, out) and name.startswith("block.") else weight
            return
        self._codes = weight
        self._scales = mapped(stored[f"{name}.scales"]).reshape(out, blocks_in(columns), 1)
        zeros = stored.get(f"{name}.zero_points")
        self._zeros = None if zeros is None else mapped(zeros).reshape(out, -1)

    def rows(self, wanted: Tensor | slice = slice(None)) -> Tensor:
        """[n, in] float32, of all rows or of these."""
        if self._whole is not None:
            return self._whole[wanted]
        codes, scales = self._codes[wanted], self._scales[wanted]
        if self._zeros is None:
            steps = codes.float()
            steps -= ZERO_POINT_8BIT
        else:
            steps = _halves(codes).reshape(*codes.shape[:2], BLOCK).float()
            steps -= _halves(self._zeros[wanted])[:, : codes.shape[1], None].float()
        steps *= scales
        return steps.flatten(1)[:, : self._columns]

    @property
    def pieces(self) -> list[slice]:
        """Of its rows, small enough to be expanded at one time."""
        if self._whole is not None:
            return [slice(0, self.out)]
        rows = max(1, PIECE_ELEMENTS // self._columns)
        return [slice(first, min(first + rows, self.out)) for first in range(0, self.out, rows)]


class _Product(torch.autograd.Function):
    """x W^T with a frozen W, which is expanded again for the gradient rather than kept."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, matrix: Frozen) -> Tensor:
        ctx.matrix = matrix
        made = given.new_empty(*given.shape[:-1], matrix.out)
        for piece in matrix.pieces:
            made[..., piece] = given @ matrix.rows(piece).T
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        first, *others = ctx.matrix.pieces
        found = gradient[..., first] @ ctx.matrix.rows(first)
        for piece in others:
            found += gradient[..., piece] @ ctx.matrix.rows(piece)
        return found, None


def product(given: Tensor, matrix: Frozen) -> Tensor:
    found: Tensor = _Product.apply(given, matrix)
    return found


class TrainedStage(Factored):
    """Blocks of a model with factors beside some matrices; with the embedding and the head if the stage has them."""

    def __init__(
        self,
        manifest: StageManifest,
        stored: Mapping[str, Array],
        spec: AdapterSpec,
        factors: Mapping[str, Array],
        context_tokens: int,
    ) -> None:
        """`stored` as engine.memory.map_weights gives them, `factors` by name (models.lora.adapter); those of other
        blocks are left alone."""
        self._manifest, self._spec, config = manifest, spec, manifest.config
        tables = (["embedding"] if manifest.embedding else []) + ([head_matrix(config)] if manifest.head else [])
        self._tables = {
            name: Frozen(stored, name, config.vocabulary, config.hidden, table_precision(manifest.precision))
            for name in dict.fromkeys(tables)
        }
        self._matrices = {
            f"block.{block}.{name}": Frozen(
                stored, f"block.{block}.{name}", *matrix_size(config, name), manifest.precision
            )
            for block in manifest.blocks
            for name in MATRICES
        }
        self._vectors = {
            info.name: mapped(stored[info.name]) for info in manifest.weights if info.name.endswith(("norm", "bias"))
        }
        self.factors = {
            name: trained(values) for name, values in factors.items() if int(name.split(".")[1]) in manifest.blocks
        }
        cosines, sines = rope_tables(config, context_tokens)
        self._cosines, self._sines = given(cosines), given(sines)

    def embedded(self, ids: Tensor) -> Tensor:
        """[n, T] -> [n, T, hidden]."""
        return self._tables["embedding"].rows(ids.flatten()).reshape(*ids.shape, -1)

    def run(self, residual: Tensor, _lengths: Tensor | None = None, remember: bool = True) -> Tensor:
        """Its blocks over [n, T, hidden]; what lies behind a text changes nothing of it. With `remember` false what a
        block needs for its gradient is computed again instead of kept (activation checkpointing)."""
        for block in self._manifest.blocks:
            if remember:
                residual = self._block(block, residual)
            else:
                residual = checkpoint(self._block, block, residual, use_reentrant=False)
        return residual

    def logits(self, residual: Tensor) -> Tensor:
        """[n, T, hidden] -> [n, T, vocabulary]."""
        return product(self._norm(residual, "final_norm"), self._tables[head_matrix(self._manifest.config)])

    def loss(self, residual: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the targets [n, T] that are not IGNORED: row t is to say targets[t]. The rows that
        count alone are put through the head, whose logits are what takes most memory."""
        counted = targets != IGNORED
        return functional.cross_entropy(self.logits(residual[counted]), targets[counted])

    def loss_of(self, batch: Batch, remember: bool = True) -> Tensor:
        """The same of a batch, by the whole model. `remember` as for `run`."""
        return self.loss_at(self.run(self.embedded(given(batch.ids)), remember=remember), batch)

    def loss_at(self, features: Tensor, batch: Batch) -> Tensor:
        """The same of what the last block makes of a batch."""
        return self.loss(features, given(batch.targets))

    def judged_at(self, features: Tensor, batch: Batch) -> Judged:
        with torch.no_grad():
            return Judged(float(self.loss_at(features, batch)), batch.counted)

    def features(self, states: Tensor, lengths: Tensor, remember: bool = True) -> Tensor:
        """What the head looks at: all that its blocks make of [n, T, hidden]."""
        return self.run(states, lengths, remember)

    def judged(self, batch: Batch) -> Judged:
        """The same without gradients."""
        with torch.no_grad():
            return Judged(float(self.loss_of(batch)), batch.counted)

    def features_and_wide(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and what the last block's `down`, the last matrix before them, is given [n, T, ffn]."""
        *before, last = self._manifest.blocks
        for block in before:
            states = self._block(block, states)
        middle, wide = self._widened(last, states)
        return self._narrowed(last, middle, wide), wide

    def _block(self, block: int, before: Tensor) -> Tensor:
        return self._narrowed(block, *self._widened(block, before))

    def _widened(self, block: int, before: Tensor) -> tuple[Tensor, Tensor]:
        """A block but for its last matrix: what is added to, and what that is given."""
        prefix = f"block.{block}."
        middle = before + self._attended(prefix, self._norm(before, f"{prefix}attention_norm"))
        normed = self._norm(middle, f"{prefix}ffn_norm")
        gate = functional.silu(self._through(prefix, "gate", normed))
        return middle, gate * self._through(prefix, "up", normed)

    def _narrowed(self, block: int, middle: Tensor, wide: Tensor) -> Tensor:
        return middle + self._through(f"block.{block}.", "down", wide)

    def _attended(self, prefix: str, normed: Tensor) -> Tensor:
        config, scale = self._manifest.config, self._spec.scale
        stacked = product(normed, self._matrices[f"{prefix}qkv"])
        if config.qkv_bias:
            stacked = stacked + self._vectors[f"{prefix}qkv_bias"]
        parts = stacked.split([config.q_width, config.kv_width, config.kv_width], dim=-1)
        query, key, value = (
            self._added(prefix + name, normed, part, scale).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            for name, part in zip(("q", "k", "v"), parts, strict=True)
        )
        if config.qk_norm:
            query, key = self._norm(query, f"{prefix}q_norm"), self._norm(key, f"{prefix}k_norm")
        shared = config.heads // config.kv_heads
        attended = functional.scaled_dot_product_attention(
            self._rotated(query),
            self._rotated(key).repeat_interleave(shared, dim=1),
            value.repeat_interleave(shared, dim=1),
            is_causal=True,
        )
        return self._through(prefix, "o", attended.transpose(1, 2).flatten(2))

    def _through(self, prefix: str, name: str, given: Tensor) -> Tensor:
        return self._added(prefix + name, given, product(given, self._matrices[prefix + name]), self._spec.scale)

    def _rotated(self, heads: Tensor) -> Tensor:
        """Turn each pair of dimensions of [n, heads, T, head_dim] by its position's angle."""
        rows = slice(heads.shape[2])
        return turned(heads, self._cosines[rows], self._sines[rows], self._manifest.config.rope_interleaved)

    def _norm(self, values: Tensor, weight: str) -> Tensor:
        return rms_norm(values, self._vectors[weight], self._manifest.config.rms_eps)


def _halves(codes: Tensor) -> Tensor:
    """Two 4 bit codes of each byte, the lower first, side by side in the last dimension."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
