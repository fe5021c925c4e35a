"""The Llama family as a graph of modules: embedding, blocks, head, in a chain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Final

from models.build.keys import profile_key
from models.build.layout import MATRICES, block_weights, head_matrix, table_weights
from models.engine.manifest import Precision, WeightInfo, WireDtype
from models.families.config import LlamaConfig, matrix_size
from models.graph import Edge, Graph, Module, ModuleKind

WIRE_BYTES: Final[Mapping[str, int]] = {"f32": 4, "f16": 2, "bf16": 2}

KV_ITEM_BYTES: Final = 4
"""Keys and values are kept in float32: onnxruntime's attention on CPUs has no faster half-precision path."""


def module_names(config: LlamaConfig) -> tuple[str, ...]:
    """Give 'embedding', 'block.0' .., 'head'."""
    return ("embedding", *(f"block.{index}" for index in range(config.blocks)), "head")


def build_graph(
    model: str,
    config: LlamaConfig,
    precision: Precision,
    wire_dtype: WireDtype,
    artifacts: Mapping[str, tuple[str, ...]],
) -> Graph:
    """Describe a packed model. `artifacts` gives the digests of the files of each module, by the module's name."""
    names = module_names(config)
    modules = tuple(_module(name, config, precision, wire_dtype, artifacts[name]) for name in names)
    item_bytes = WIRE_BYTES[wire_dtype]
    edges = tuple(
        Edge(
            source=source,
            target=target,
            elements_per_token=config.hidden,
            bytes_per_token=config.hidden * item_bytes,
        )
        for source, target in pairwise(names)
    )
    return Graph(
        model=model,
        family=config.family,
        precision=precision,
        wire_dtype=wire_dtype,
        hidden=config.hidden,
        vocabulary=config.vocabulary,
        blocks=config.blocks,
        max_context_tokens=config.usable_context,
        modules=modules,
        edges=edges,
    )


def _module(
    name: str, config: LlamaConfig, precision: Precision, wire_dtype: WireDtype, artifacts: tuple[str, ...]
) -> Module:
    kind: ModuleKind = "block" if name.startswith("block.") else "head" if name == "head" else "embedding"
    if kind == "block":
        weights = block_weights(config, 0, precision)
        macs = sum(out * columns for out, columns in (matrix_size(config, matrix) for matrix in MATRICES))
    elif kind == "head":
        norm = WeightInfo("final_norm", "f32", (config.hidden,))
        weights = (norm, *table_weights(head_matrix(config), config, precision))
        macs = config.hidden * config.vocabulary
    else:
        weights = table_weights("embedding", config, precision)
        macs = 0
    return Module(
        name=name,
        kind=kind,
        profile_key=profile_key(config, kind, precision, wire_dtype),
        weight_bytes=sum(info.size_bytes for info in weights),
        artifacts=artifacts,
        kv_bytes_per_token=2 * config.kv_width * KV_ITEM_BYTES if kind == "block" else 0,
        macs_per_token=macs,
    )
