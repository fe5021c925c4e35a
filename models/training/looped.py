"""An encoder of which one block stands at every depth, its matrices divided among several devices (tensor parallelism:
Shoeybi et al., Megatron-LM, 2019; one block for all depths: Dehghani et al., Universal Transformers, 2018).

    hub                                          shard k
    for each depth:
      h                          -- h -->        a_k = attention of its heads (h) o_k
      s = h + sum a_k + bias     <-- a_k --
      u = norm(s)                -- u -->        f_k = gelu(u up_k) down_k
      t = u + sum f_k + bias     <-- f_k --
      h = norm(t)

Backwards the same the other way: dL/dt goes out with u, and each shard's part of dL/du comes back. A shard keeps
nothing of a batch: it computes again what its gradients need. So what it holds does not depend on the depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional

from models.engine.base import Array
from models.families.bert import BertConfig
from models.lora.looped import FIRST
from models.training.encoder import TrainedEncoder, inside
from models.training.factored import Factored, trained
from wire.shares import PartOfBlock, Share

SUMMED: tuple[PartOfBlock, PartOfBlock] = ("attention", "feed-forward")
"""Of a block, in order: after each of these all shards' parts are summed."""
_BIAS = {"attention": f"{FIRST}o.bias.w", "feed-forward": f"{FIRST}down.bias.w"}
_NORM = {"attention": f"{FIRST}norm0", "feed-forward": f"{FIRST}norm1"}


class Shard(Factored):
    """A share of the block. `factors` by name (models.lora.looped.shapes_of_shard)."""

    def __init__(self, config: BertConfig, share: Share, factors: Mapping[str, Array]) -> None:
        self._heads = share.heads
        self._head_width = config.hidden_size // config.num_attention_heads
        self.factors = {name: trained(values) for name, values in factors.items()}

    def made(self, part: PartOfBlock, states: Tensor, lengths: Tensor) -> Tensor:
        """Its part of a sum: [n, T, hidden] -> [n, T, hidden]."""
        return self._attended(states, lengths) if part == "attention" else self._fed_forward(states)

    def backwards(self, part: PartOfBlock, states: Tensor, gradient: Tensor, lengths: Tensor) -> Tensor:
        """Its part of the gradient by the states, from that by the sum; its weights' gradients are added up."""
        states = states.detach().requires_grad_(True)
        self.made(part, states, lengths).backward(gradient)
        assert states.grad is not None
        return states.grad

    def _attended(self, states: Tensor, lengths: Tensor) -> Tensor:
        seen = inside(lengths, states.shape[1])[:, None, None, :]
        query, key, value = (
            self._through(name, states).unflatten(-1, (self._heads, self._head_width)).transpose(1, 2)
            for name in ("q", "k", "v")
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return functional.linear(mixed.transpose(1, 2).flatten(2), self.factors[f"{FIRST}o.weight.w"])

    def _fed_forward(self, states: Tensor) -> Tensor:
        wide = functional.gelu(self._through("up", states))
        return functional.linear(wide, self.factors[f"{FIRST}down.weight.w"])

    def _through(self, matrix: str, states: Tensor) -> Tensor:
        at = f"{FIRST}{matrix}"
        return functional.linear(states, self.factors[f"{at}.weight.w"], self.factors[f"{at}.bias.w"][0])


class Hub(Factored):
    """What is not divided: `factors` by name (models.lora.looped.shapes_of_hub), the task module's among them."""

    def __init__(self, config: BertConfig, factors: Mapping[str, Array]) -> None:
        self._epsilon = config.layer_norm_eps
        self.factors = {name: trained(values) for name, values in factors.items()}

    def added(self, part: PartOfBlock, parts: Sequence[Tensor], states: Tensor) -> Tensor:
        """The sum of all shards' parts, in their order, with bias and residual: what is then `normed`."""
        total = parts[0]
        for one in parts[1:]:
            total = total + one
        return total + self.factors[_BIAS[part]][0] + states

    def normed(self, part: PartOfBlock, rows: Tensor) -> Tensor:
        at = _NORM[part]
        weight, bias = self.factors[f"{at}.weight.w"][0], self.factors[f"{at}.bias.w"][0]
        return functional.layer_norm(rows, weight.shape, weight, bias, self._epsilon)

    def backwards(self, part: PartOfBlock, rows: Tensor, gradient: Tensor) -> Tensor:
        """The gradient by `rows` that were normed, from that by what came of them: it is that by the sum of all parts,
        by the bias and by the residual alike."""
        rows = rows.detach().requires_grad_(True)
        self.normed(part, rows).backward(gradient)
        assert rows.grad is not None
        bias = self.factors[_BIAS[part]]
        if bias.requires_grad:
            piece = rows.grad.sum(dim=(0, 1))[None]
            bias.grad = piece if bias.grad is None else bias.grad + piece
        return rows.grad

    @staticmethod
    def means(states: Tensor, lengths: Tensor) -> Tensor:
        return TrainedEncoder.means(states, lengths)
