"""Sentence encoders of the Bert family in torch for training: low-rank factors in the blocks, and a task module on top.

    ids [n, T] -> embedding -> blocks with factors -> mean over each text -> task module -> a score for each label

The task module (models.training.heads) is trained whole; all else is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.engine.base import Array
from models.formats.bert import BLOCK_NORMS, EMBEDDINGS_NORM, MATRICES, BertFile
from models.lora.adapter import AdapterSpec
from models.training.factored import mapped, trained
from models.training.heads import TaskModule
from models.training.samples import Batch, Judged
from models.training.tensors import given


class TrainedEncoder(TaskModule):
    """An encoder, or some of its blocks. `factors` by name (models.lora.adapter), the task module's among them."""

    def __init__(
        self, file: BertFile, spec: AdapterSpec, factors: Mapping[str, Array], blocks: range | None = None
    ) -> None:
        """Raises CorruptData for a checkpoint that is not what its configuration says."""
        self._config, self._spec = file.config, spec
        self._blocks = range(self._config.blocks) if blocks is None else blocks
        self._words, self._places = mapped(file.words()), mapped(file.places())
        self._norms: dict[str, tuple[Tensor, Tensor]] = {EMBEDDINGS_NORM: _pair(file.norm(EMBEDDINGS_NORM))}
        self._linear: dict[str, tuple[Tensor, Tensor]] = {}
        for block in self._blocks:
            for matrix in MATRICES:
                self._linear[f"block.{block}.{matrix}"] = _pair(file.linear(block, matrix))
            for number, norm in enumerate(BLOCK_NORMS):
                self._norms[f"block.{block}.norm{number}"] = _pair(file.norm(f"encoder.layer.{block}.{norm}"))
        self.factors = {name: trained(values) for name, values in factors.items()}

    def loss_of(self, batch: Batch, remember: bool = True) -> Tensor:
        """Mean cross entropy over the texts of a batch that have a label."""
        return self.loss_at(self._features(batch, remember), batch)

    def judged(self, batch: Batch) -> Judged:
        """The same without gradients, and of how many texts the label has the highest score."""
        with torch.no_grad():
            return self.judged_at(self._features(batch, True), batch)

    def features(self, states: Tensor, lengths: Tensor, remember: bool = True) -> Tensor:
        """What the task module looks at: [n, T, hidden] -> [n, hidden], means over each text of what blocks make."""
        return self.means(self.run(states, lengths, remember), lengths)

    def embedded(self, ids: Tensor) -> Tensor:
        """[n, T] -> [n, T, hidden]."""
        rows = functional.embedding(ids, self._words) + self._places[: ids.shape[1]]
        return self._normed(EMBEDDINGS_NORM, rows)

    def run(self, states: Tensor, lengths: Tensor, remember: bool = True) -> Tensor:
        """Its blocks over [n, T, hidden], of which the first `lengths` [n] rows are text. With `remember` false what a
        block needs for its gradient is computed again instead of kept (activation checkpointing)."""
        seen = inside(lengths, states.shape[1])[:, None, None, :]
        for block in self._blocks:
            if remember:
                states = self._block(block, states, seen)
            else:
                states = checkpoint(self._block, block, states, seen, use_reentrant=False)
        return states

    @staticmethod
    def means(states: Tensor, lengths: Tensor) -> Tensor:
        """[n, T, hidden] -> [n, hidden], over the rows of each text."""
        return (states * inside(lengths, states.shape[1])[:, :, None]).sum(dim=1) / lengths[:, None]

    def _features(self, batch: Batch, remember: bool) -> Tensor:
        ids, lengths = given(batch.ids), given(batch.lengths)
        return self.features(self.embedded(ids), lengths, remember)

    def _block(self, block: int, states: Tensor, seen: Tensor) -> Tensor:
        at, heads = f"block.{block}.", self._config.num_attention_heads
        query, key, value = (
            self._through(f"{at}{name}", states).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v")
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        attended = self._through(f"{at}o", mixed.transpose(1, 2).flatten(2))
        states = self._normed(f"{at}norm0", attended + states)
        wide = functional.gelu(self._through(f"{at}up", states))
        return self._normed(f"{at}norm1", self._through(f"{at}down", wide) + states)

    def _through(self, name: str, given: Tensor) -> Tensor:
        weight = self.factors.get(f"{name}.weight.w")
        if weight is not None:
            return functional.linear(given, weight, self.factors[f"{name}.bias.w"][0])
        return self._added(name, given, functional.linear(given, *self._linear[name]), self._spec.scale)

    def _normed(self, name: str, rows: Tensor) -> Tensor:
        weight, bias = self._norms[name]
        trained_weight = self.factors.get(f"{name}.weight.w")
        if trained_weight is not None:
            weight, bias = trained_weight[0], self.factors[f"{name}.bias.w"][0]
        return functional.layer_norm(rows, weight.shape, weight, bias, self._config.layer_norm_eps)


def _pair(arrays: tuple[Array, Array]) -> tuple[Tensor, Tensor]:
    return mapped(arrays[0]), mapped(arrays[1])


def inside(lengths: Tensor, most: int) -> Tensor:
    """[n, T] which rows are text."""
    return torch.arange(most)[None, :] < lengths[:, None]
