"""An adapter: which matrices have low-rank factors, of which rank, and how they are named in files; and the task module
of a model that learns labels, which is trained with them.

In a file its factors have the names and the layout of PEFT (`adapter_config.json` and `adapter_model.safetensors`), so
that others can load it. Inside, a factor is named as its matrix: 'block.3.q.a' is A [r, in], 'block.3.q.b' is
B [out, r].

GGUF files of the arch 'llama' have the rows of q and k in another order than Hugging Face's, since their rotation
pairs neighbours (models.families.config.rope_interleaved). B has a row for each row of its matrix: what leaves for a
PEFT file is put into Hugging Face's order, and what comes from one into ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, get_args

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from models.families.bert import BertConfig, matrix_sizes
from models.families.config import LlamaConfig, matrix_size
from models.families.features import FeatureConfig
from models.families.modalities import ModalitiesConfig
from models.lora.looped import of_first
from models.lora.whole import shapes_of
from wire.limits import MAX_ADAPTER_RANK, MAX_LABELS
from wire.messages import Matrix
from wire.modalities import CONNECTOR

Floats = npt.NDArray[np.float32]

MATRICES: Final[tuple[Matrix, ...]] = get_args(Matrix)
PARTS: Final = ("a", "b", "w", "c")
HEAD: Final = "head.c"
"""The task module of a model that learns labels: [labels, hidden + 1], the last column its bias."""
HEAD_FILE: Final = "head.safetensors"
"""In it, beside PEFT's two files, with `weight` [labels, hidden], `bias` [labels], and the labels as JSON."""

CONNECTORS_FILE: Final = "connectors.safetensors"
"""Of a job of several modalities: for each `NAME.weight` [width, features] and `NAME.bias` [width]."""

Config = LlamaConfig | BertConfig | FeatureConfig | ModalitiesConfig

_PEFT: Final[Mapping[str, str]] = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_PEFT_OF_BERT: Final[Mapping[str, str]] = {
    **{name[0]: f"attention.self.{name}" for name in ("query", "key", "value")},
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def _name(layers: str, names: Mapping[str, str]) -> re.Pattern[str]:
    return re.compile(
        rf"base_model\.model\.{layers}\.(0|[1-9][0-9]{{0,3}})\.({'|'.join(map(re.escape, names.values()))})"
        r"\.lora_([AB])\.weight"
    )


_PEFT_NAME: Final = _name(r"model\.layers", _PEFT)
_PEFT_NAME_OF_BERT: Final = _name(r"encoder\.layer", _PEFT_OF_BERT)


class AdapterSpec(Struct, frozen=True, kw_only=True):
    """`alpha` / rank is the scale of the product."""

    rank: Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)]
    alpha: Annotated[float, Meta(gt=0, le=1e6)]
    matrices: tuple[Matrix, ...] = ("q", "v")
    seed: int = 0
    labels: Annotated[int, Meta(ge=0, le=MAX_LABELS)] = 0
    """That a task module tells apart; 0: there is none."""
    blocks: bool = False
    """All weights of all blocks are trained instead of factors (models.lora.whole), of an encoder."""
    last_only: bool = False
    """The last block alone has factors."""
    looped: bool = False
    """With blocks: one of them stands at every depth (models.lora.looped)."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def sizes(config: Config, matrix: Matrix) -> tuple[int, int]:
    """(out, in) of a matrix; KeyError for one that such a model has not."""
    if isinstance(config, BertConfig):
        return matrix_sizes(config)[matrix]
    if isinstance(config, FeatureConfig | ModalitiesConfig):
        raise KeyError(matrix)
    rows_of_qkv = {"q": config.q_width, "k": config.kv_width, "v": config.kv_width}
    return (rows_of_qkv[matrix], config.hidden) if matrix in rows_of_qkv else matrix_size(config, matrix)


def adapted(blocks: int, spec: AdapterSpec) -> range:
    """Which of so many blocks have factors."""
    if spec.blocks:
        return range(0)
    return range(blocks - 1 if spec.last_only else 0, blocks)


def shapes(config: Config, spec: AdapterSpec) -> dict[str, tuple[int, int]]:
    """Name -> shape of all factors, blocks in order, the task module last. On features there is nothing else, but for
    connectors before it where they are of several modalities. ValueError for weights of a model whose weights can't be
    trained."""
    found: dict[str, tuple[int, int]] = {}
    if spec.blocks:
        if not isinstance(config, BertConfig):
            raise ValueError("weights are trained of encoders alone")
        found.update(of_first(shapes_of(config)) if spec.looped else shapes_of(config))
    for block in adapted(config.blocks, spec):
        for matrix in spec.matrices:
            out, columns = sizes(config, matrix)
            found[f"block.{block}.{matrix}.a"] = (spec.rank, columns)
            found[f"block.{block}.{matrix}.b"] = (out, spec.rank)
    if isinstance(config, ModalitiesConfig):
        found.update(config.connectors())
    if spec.labels:
        found[HEAD] = (spec.labels, config.hidden + 1)
    return found


def within(shaped: Mapping[str, tuple[int, int]], blocks: range, head: bool) -> dict[str, tuple[int, int]]:
    """Of these the factors of some blocks, and the task module if `head`: they lie side by side in what `flat` gives if
    the task module goes with the last block."""
    return {
        name: shape for name, shape in shaped.items() if (head if name == HEAD else int(name.split(".")[1]) in blocks)
    }


def initial(config: Config, spec: AdapterSpec) -> dict[str, Floats]:
    """A of normal numbers with variance 1 / rank, B of zeros: the adapter changes nothing yet, and a task module of
    zeros knows nothing. A connector is of normal numbers with variance 1 / features. The same on all devices; A of a
    smaller rank is the beginning of that of a larger one, but for its size. Where weights are trained they are zeros
    here, too: a checkpoint has them (models.lora.whole)."""
    return drawn(shapes(config, spec), spec.seed)


def drawn(shaped: Mapping[str, tuple[int, int]], seed: int, round_number: int = 0) -> dict[str, Floats]:
    """The same for factors of these shapes, another A for another round."""
    factors: dict[str, Floats] = {}
    for number, (name, shape) in enumerate(shaped.items()):
        connects = name.startswith(CONNECTOR)
        if not connects and not name.endswith(".a"):
            factors[name] = np.zeros(shape, np.float32)
            continue
        made = np.random.default_rng([seed, number, round_number]).standard_normal(shape, dtype=np.float32)
        factors[name] = made / np.float32(np.sqrt(shape[1] - 1 if connects else shape[0]))
        if connects:
            factors[name][:, -1] = 0
    return factors


def flat(factors: Mapping[str, Floats], shaped: Mapping[str, tuple[int, int]], parts: Sequence[str] = PARTS) -> Floats:
    """[n] the factors of these parts, one behind the other in the order of `shaped`: as they travel. Parts are the
    letters that names end with, or modules."""
    found = [factors[name].reshape(-1) for name in shaped if is_part(name, parts)]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def is_part(name: str, parts: Sequence[str]) -> bool:
    return name[-1] in parts or name[:-2] in parts


def length_of(shaped: Mapping[str, tuple[int, int]], parts: Sequence[str] = PARTS) -> int:
    """Numbers that `flat` gives."""
    return sum(rows * columns for name, (rows, columns) in shaped.items() if is_part(name, parts))


def named(vector: Floats, shaped: Mapping[str, tuple[int, int]], parts: Sequence[str] = PARTS) -> dict[str, Floats]:
    """The factors that `flat` laid out, as views; ValueError for a vector of another length."""
    if len(vector) != length_of(shaped, parts):
        raise ValueError(f"{len(vector)} numbers, the factors have {length_of(shaped, parts)}")
    found: dict[str, Floats] = {}
    start = 0
    for name, (rows, columns) in shaped.items():
        if is_part(name, parts):
            found[name] = vector[start : start + rows * columns].reshape(rows, columns)
            start += rows * columns
    return found


def peft_modules(config: Config, spec: AdapterSpec) -> dict[str, Any]:
    """PEFT's `target_modules`: ends of names, in blocks that `layers_to_transform` lists if not in all; or a pattern,
    since in Bert one name is the end of another, and a pattern goes with no list."""
    if isinstance(config, BertConfig):
        block = str(config.blocks - 1) if spec.last_only else r"\d+"
        names = "|".join(re.escape(_PEFT_OF_BERT[matrix]) for matrix in sorted(spec.matrices))
        return {"target_modules": rf".*\.layer\.{block}\.({names})"}
    found: dict[str, Any] = {"target_modules": sorted(_PEFT[matrix].rpartition(".")[2] for matrix in spec.matrices)}
    if spec.last_only:
        found["layers_to_transform"] = list(adapted(config.blocks, spec))
    return found


def to_peft(config: Config, factors: Mapping[str, Floats]) -> Iterator[tuple[str, Floats]]:
    """Factors by PEFT's names, rows of q and k in Hugging Face's order; without the task module, which it has not."""
    for name, values in factors.items():
        if name == HEAD:
            continue
        block, matrix, part = name.removeprefix("block.").split(".")
        if isinstance(config, BertConfig):
            rows, long = values, f"encoder.layer.{block}.{_PEFT_OF_BERT[matrix]}"
        elif isinstance(config, LlamaConfig):
            rows = _paired(config, matrix, values, to_halves=True) if part == "b" else values
            long = f"model.layers.{block}.{_PEFT[matrix]}"
        else:
            raise KeyError(name)
        yield f"base_model.model.{long}.lora_{part.upper()}.weight", np.ascontiguousarray(rows)


def from_peft(config: Config, tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    """The other way round; KeyError for a tensor that is of no matrix of ours."""
    bert = isinstance(config, BertConfig)
    pattern = _PEFT_NAME_OF_BERT if bert else _PEFT_NAME
    names = {long: short for short, long in (_PEFT_OF_BERT if bert else _PEFT).items()}
    factors: dict[str, Floats] = {}
    for name, values in tensors.items():
        found = pattern.fullmatch(name)
        if found is None:
            raise KeyError(name)
        block, long, letter = found.groups()
        matrix = names[long]
        turn = letter == "B" and isinstance(config, LlamaConfig)
        rows = _paired(config, matrix, values, to_halves=False) if turn else values  # type: ignore[arg-type]
        factors[f"block.{int(block)}.{matrix}.{letter.lower()}"] = np.ascontiguousarray(rows)
    return factors


def _paired(config: LlamaConfig, matrix: str, rows: Floats, to_halves: bool) -> Floats:
    """Rows of q or k, where a rotation turns neighbours, with both halves of a head one behind the other; or back."""
    if not config.rope_interleaved or matrix not in ("q", "k"):
        return rows
    heads = rows.reshape(-1, config.head_dim, rows.shape[1])
    order = np.arange(config.head_dim).reshape(-1, 2).T.reshape(-1)
    return heads[:, order if to_halves else np.argsort(order)].reshape(rows.shape)
