"""What a worker that trains takes at its peak, from the sizes of what it does. Pure.

Fitted to processes that trained SmolLM2 with 4, 8 and 32 bit weights, one to a thousand tokens at a time, two to seven
matrices per block and ranks of 8 and 64, and MiniLM with 512 and 4,096 tokens (`python -m benchmarks.tuning --parts
memory` measures some of them again); for parts of split models, for the last block alone and for one block at every
depth to some processes more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from models.families.bert import BertConfig, matrix_sizes
from models.families.config import LlamaConfig
from models.families.features import FeatureConfig
from models.families.modalities import ModalitiesConfig
from models.lora.adapter import AdapterSpec, length_of, shapes, sizes

FLOAT: Final = 4

TORCH_BYTES: Final = 390 << 20
"""Interpreter, torch, its optimisers, and pieces of a matrix while they are expanded."""
ADAPTER_COPIES: Final = 4.4
"""Factors, gradients, two moments of Adam, and the vector that comes or goes."""
HELD_COPIES: Final = 3
"""Of factors that are not trained: the vector that comes, as it is checked, and as it is computed with."""
LOGITS_COPIES: Final = 5
"""Logits, their gradient, and what cross entropy makes of them."""
WORKING_COPIES: Final = 4
"""Of what one block keeps, while its gradients are made."""
ENCODER_BYTES: Final = 343 << 20
"""TORCH_BYTES where no matrix is expanded."""
ENCODER_ROWS: Final = 9
"""As wide as the model, that a block of an encoder keeps."""
ENCODER_WORKING: Final = 4.7
"""WORKING_COPIES of an encoder."""
ENCODER_ENDS_BYTES: Final = 286 << 20
"""ENCODER_BYTES of a device that has an encoder's ends."""
ENDS_COPIES: Final = 9
"""Of states: as they go out, features as they come, their gradient, and what is made on the way."""
ENDS_LOGITS_COPIES: Final = 3
"""LOGITS_COPIES where the head is all that there is."""
TRUNK_COPIES: Final = 4
"""Of what a device sent: states, features, and gradients of these."""
TRUNK_WORKING: Final = 6
"""As wide as the model, that is left of each block while its pieces come and go; with what its factors make."""
HEAD_COPIES: Final = 4
"""Of a task module, or a factor: as it is, as it comes, its gradient, and as that goes out."""
HUB_SUMS: Final = 4
"""Of states, that a hub keeps of each depth: two sums, and as much again that lies free between them."""
HUB_COPIES: Final = 8
"""Of states: what is summed and normed, and gradients of these, as they go out."""
HUB_ROWS: Final = 6
"""As wide as the model: biases and norms."""
SHARD_COPIES: Final = 6
"""Of states: as they come with their gradient, and both as they go out."""
SHARD_WORKING: Final = 3
"""Of what is between its matrices: as it is, bent, and their gradients."""
PAGE: Final = 4096
HEAD_BYTES: Final = 345 << 20
"""ENCODER_BYTES where a task module is all there is."""
HEAD_ALONE_COPIES: Final = 12
"""ADAPTER_COPIES of it: what an optimiser makes on the way is no small part any more."""
SPACE_COPIES: Final = 8
"""Of where samples are in the space of several modalities: as it is, normed, and gradients of these."""
NET_BYTES: Final = 60 << 20
"""onnxruntime, where it makes features of pictures."""
NET_COPIES: Final = 2
"""Of the weights of such a net: mapped, and as onnxruntime packs them."""
TENSOR_COPIES: Final = 16
"""Of its widest tensor, and of others as wide, while it runs."""
PIXEL_BYTES: Final = 8
"""Of a picture, whose pixels have four: as it is decoded, and turned upright."""
ROW_BYTES: Final = 600
"""Of one sample beside its features: its number and label as rounds draw them."""


def peak_bytes(config: LlamaConfig, packed_bytes: int, spec: AdapterSpec, tokens: int, remember: bool) -> int:
    """Of a step over so many tokens in all. `remember`: blocks keep what their gradients need, instead of computing it
    again (activation checkpointing)."""
    adapted = sum(sum(sizes(config, matrix)) for matrix in spec.matrices)
    block = FLOAT * (4 * config.hidden + 3 * config.ffn + adapted)
    kept = _differentiated(config, spec) * (block if remember else FLOAT * config.hidden)
    copies = ENDS_LOGITS_COPIES if spec.last_only else LOGITS_COPIES  # what blocks keep does not lie between them
    logits = copies * FLOAT * config.vocabulary
    adapter = FLOAT * length_of(shapes(config, spec))
    by_token = tokens * (kept + (WORKING_COPIES - int(remember)) * block + logits)
    return TORCH_BYTES + packed_bytes + round(ADAPTER_COPIES * adapter) + by_token


def ends_peak_bytes(
    config: LlamaConfig | BertConfig,
    weight_bytes: int,
    spec: AdapterSpec,
    tokens: int,
    lowrank: bool = False,
    said_tokens: int | None = None,
) -> int:
    """Of a device that has the ends of a split model, and trains them on so many tokens at once. `lowrank`: it sends
    gradients by what the last matrix's factors make. `said_tokens`: so many of a language model's tokens are said at
    one time; None: all."""
    states = FLOAT * config.hidden * tokens
    if isinstance(config, LlamaConfig):
        logits = (tokens if said_tokens is None else said_tokens) * ENDS_LOGITS_COPIES * FLOAT * config.vocabulary
        factor = HEAD_COPIES * FLOAT * spec.rank * (config.hidden + tokens) if lowrank else 0
        return ENCODER_BYTES + weight_bytes + ENDS_COPIES * states + logits + factor
    words = max(FLOAT * config.hidden, PAGE) * min(tokens, config.vocabulary)
    head = HEAD_COPIES * FLOAT * spec.labels * (config.hidden + 1)
    return ENCODER_ENDS_BYTES + words + head + ENDS_COPIES * states


def trunk_peak_bytes(
    config: LlamaConfig | BertConfig,
    weight_bytes: int,
    spec: AdapterSpec,
    tokens: int,
    ends: int,
    remember: bool,
    blocks: int | None = None,
    lowrank: bool = False,
) -> int:
    """Of the device that has all blocks, or so many of them, for so many others with so many tokens each.
    `weight_bytes` are of all blocks. `remember`: blocks keep what the gradients of all of them need, instead of
    computing it again for one after the other. `lowrank`: gradients go by what the last matrix's factors make, of which
    its inputs are all that is kept."""
    if blocks is not None and blocks < config.blocks:
        weight_bytes -= (config.blocks - blocks) * _block_weight_bytes(config, weight_bytes)
        config = _shortened(config, blocks)
    waiting = TRUNK_COPIES * FLOAT * config.hidden * tokens * ends
    if isinstance(config, BertConfig):
        once = encoder_peak_bytes(config, weight_bytes, spec, tokens, remember)
        kept_by_each = _differentiated(config, spec) * _encoder_block(config, spec) * tokens
        others = kept_by_each * (ends - 1) if remember else 0
        return once + others + waiting
    adapted = sum(sum(sizes(config, matrix)) for matrix in spec.matrices)
    kept = FLOAT * (4 * config.hidden + 3 * config.ffn + adapted) if remember else FLOAT * config.hidden
    working = FLOAT * (TRUNK_WORKING * config.hidden + adapted)
    if lowrank:
        kept, working = FLOAT * (config.ffn if remember else config.hidden), 0
    adapter = FLOAT * length_of(shapes(config, spec))
    by_token = _differentiated(config, spec) * (kept + working) * tokens * (ends if remember else 1)
    return TORCH_BYTES + weight_bytes + round(ADAPTER_COPIES * adapter) + by_token + waiting


def encoder_peak_bytes(config: BertConfig, weight_bytes: int, spec: AdapterSpec, tokens: int, remember: bool) -> int:
    """The same of a sentence encoder under a task module. Of the table of words the rows of these tokens are read."""
    block = _encoder_block(config, spec)
    kept = _differentiated(config, spec) * (block if remember else FLOAT * config.hidden)
    adapter = FLOAT * length_of(shapes(config, spec))
    row = FLOAT * config.hidden
    words = row * config.vocabulary - max(row, PAGE) * min(tokens, config.vocabulary)
    by_token = tokens * (kept + (ENCODER_WORKING - int(remember)) * block)
    return round(ENCODER_BYTES + weight_bytes - max(0, words) + ADAPTER_COPIES * adapter + by_token)


def _differentiated(config: LlamaConfig | BertConfig, spec: AdapterSpec) -> int:
    """Blocks that gradients go through; of a segment the last may be one of them."""
    return min(1, config.blocks) if spec.last_only else config.blocks


def hub_peak_bytes(config: BertConfig, spec: AdapterSpec, tokens: int, ends: int, shards: int) -> int:
    """Of the hub of one block that stands at every depth: of each batch it keeps two sums of each depth, and as
    much lies free between them."""
    states = FLOAT * config.hidden * tokens
    kept = (HUB_SUMS * config.blocks + TRUNK_COPIES) * states * ends
    turn = (HUB_COPIES + 2 * shards) * states
    module = round(ADAPTER_COPIES * FLOAT * (spec.labels + HUB_ROWS) * (config.hidden + 1))
    return ENCODER_BYTES + module + kept + turn


def shard_peak_bytes(config: BertConfig, heads: int, columns: int, tokens: int, row_tokens: int) -> int:
    """Of a shard with so many heads and columns: of whatever depth, and of however many boards with data. Of attention
    there are rows of `row_tokens` for each token and head."""
    width = heads * (config.hidden // config.num_attention_heads)
    weights = config.hidden * (4 * width + 2 * columns) + 3 * width + columns
    turn = SHARD_COPIES * config.hidden + max(SHARD_WORKING * columns, SHARD_WORKING * (4 * width + heads * row_tokens))
    return ENCODER_BYTES + round(ADAPTER_COPIES * FLOAT * weights) + FLOAT * tokens * turn


def _block_weight_bytes(config: LlamaConfig | BertConfig, weight_bytes: int) -> int:
    if isinstance(config, BertConfig):
        return FLOAT * sum(out * columns for out, columns in matrix_sizes(config).values())
    return weight_bytes // config.blocks


def _shortened(config: LlamaConfig | BertConfig, blocks: int) -> LlamaConfig | BertConfig:
    if isinstance(config, BertConfig):
        return msgspec.structs.replace(config, num_hidden_layers=blocks)
    return msgspec.structs.replace(config, blocks=blocks)


def head_peak_bytes(config: FeatureConfig, spec: AdapterSpec, rows: int, kept: int, working_bytes: int) -> int:
    """The same of a task module alone, over a table of the features of so many samples, which took `working_bytes` to
    compute; `rows` of a step."""
    table = kept * (FLOAT * config.hidden + ROW_BYTES)
    adapter = FLOAT * length_of(shapes(config, spec))
    by_row = FLOAT * rows * (config.hidden + LOGITS_COPIES * spec.labels)
    return HEAD_BYTES + table + HEAD_ALONE_COPIES * adapter + by_row + working_bytes


def connectors_peak_bytes(
    config: ModalitiesConfig, spec: AdapterSpec, rows: int, kept: Mapping[str, int], working_bytes: int
) -> int:
    """The same of connectors and a task module, over tables of the features of so many samples of each modality."""
    tables = sum(kept[name] * (FLOAT * count + 2 * ROW_BYTES) for name, count in config.features.items())
    modules = FLOAT * length_of(shapes(config, spec))
    widest = max(config.features.values(), default=0)
    by_row = FLOAT * rows * (widest + SPACE_COPIES * config.width + LOGITS_COPIES * spec.labels)
    return HEAD_BYTES + tables + HEAD_ALONE_COPIES * modules + by_row + working_bytes


def _encoder_block(config: BertConfig, spec: AdapterSpec) -> int:
    """That one block of an encoder keeps for each token."""
    adapted = sum(sum(sizes(config, matrix)) for matrix in spec.matrices)
    return FLOAT * (ENCODER_ROWS * config.hidden + 2 * config.intermediate_size + adapted // 2)
