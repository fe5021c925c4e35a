"""What makes one encoder of the Bert family differ from another, by the names that its config.json has."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from models.families.config import MAX_BLOCKS, MAX_CONTEXT, MAX_HEADS, MAX_VOCABULARY, MAX_WIDTH
from wire.errors import CorruptData, Refused
from wire.limits import MAX_LABELS
from wire.messages import Label


class BertConfig(Struct, frozen=True, kw_only=True):
    """What of config.json decides the graph. Raises Refused or CorruptData when made with what can't be."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    edgelam_labels: Annotated[tuple[Label, ...], Meta(max_length=MAX_LABELS)] = ()
    """That a task module behind the encoder tells apart; none: what comes out is the vector of a text."""

    def __post_init__(self) -> None:
        if self.model_type != "bert":
            raise Refused(f"a {self.model_type!r} model is not supported as a sentence encoder", try_="a Bert model")
        if self.hidden_act != "gelu" or self.position_embedding_type != "absolute":
            raise Refused(f"{self.hidden_act} with {self.position_embedding_type} positions is not supported")
        counts = (
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MAX_BLOCKS),
            ("num_attention_heads", self.num_attention_heads, MAX_HEADS),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("vocab_size", self.vocab_size, MAX_VOCABULARY),
            ("max_position_embeddings", self.max_position_embeddings, MAX_CONTEXT),
        )
        for name, number, most in counts:
            if not 1 <= number <= most:
                raise CorruptData(f"model configuration: {name} is {number}, must be 1 to {most}")
        if self.hidden_size % self.num_attention_heads:
            raise CorruptData(f"{self.hidden_size} wide does not divide by {self.num_attention_heads} heads")
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise CorruptData(f"model configuration: layer_norm_eps is {self.layer_norm_eps}")

    @property
    def blocks(self) -> int:
        return self.num_hidden_layers

    @property
    def hidden(self) -> int:
        return self.hidden_size

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def check_context(self, tokens: int) -> None:
        """Raise Refused if texts of so many tokens are more than the model has positions for."""
        if tokens > self.max_position_embeddings:
            raise Refused(
                f"texts of {tokens} tokens: the model has {self.max_position_embeddings} positions",
                try_=f"{self.max_position_embeddings} tokens or less",
            )


def matrix_sizes(config: BertConfig) -> dict[str, tuple[int, int]]:
    """Short name -> (out, in) of a block's matrices."""
    width, inner = config.hidden_size, config.intermediate_size
    square = (width, width)
    return {"q": square, "k": square, "v": square, "o": square, "up": (inner, width), "down": (width, inner)}
