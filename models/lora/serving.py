"""Adapters beside a packed model: read from PEFT's files, checked, kept by content, laid out for stages.

    <cache>/adapters/<id>/         adapter_config.json, adapter_model.safetensors: a copy that nobody changes, since a
                                   deployment that comes back after a restart needs what it had
    <cache>/packs/<...>-lora-<id>  the factors of all adapters of a deployment, a file for each block

The scale of an adapter is in its B.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, cast

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from models.build.pack import Packed
from models.cache import write_atomic
from models.engine.manifest import Adapters, Product
from models.families.config import LlamaConfig, matrix_size
from models.formats import safetensors
from models.lora.adapter import MATRICES, from_peft, sizes
from models.packed import finish, known_files, write_file
from wire.errors import CorruptData, Refused, UsageError
from wire.limits import MAX_ADAPTER_RANK, MAX_ADAPTERS
from wire.messages import Matrix

Floats = npt.NDArray[np.float32]

CONFIG: Final = "adapter_config.json"
TENSORS: Final = "adapter_model.safetensors"
PROVENANCE: Final = "provenance.json"
"""Beside adapters that were trained here."""

MOST_CONFIG_BYTES: Final = 1 << 20
MOST_TENSOR_BYTES: Final = 1 << 30
MOST_WIDTH: Final = 512
"""Ranks of all adapters of a deployment."""

PACK_VERSION: Final = 1
PRODUCTS: Final[Mapping[Product, tuple[Matrix, ...]]] = {
    "qkv": ("q", "k", "v"), "o": ("o",), "gate": ("gate",), "up": ("up",), "down": ("down",),
}  # fmt: skip


class _Config(Struct, frozen=True, kw_only=True):
    """What counts of PEFT's adapter_config.json."""

    peft_type: str
    r: Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)]
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)]
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Any] = {}
    alpha_pattern: dict[str, Any] = {}
    modules_to_save: list[str] | None = None


class _Provenance(Struct, frozen=True, kw_only=True):
    """What counts of a provenance.json of ours (docs/tuning.md)."""

    base: str = ""


class Adapter(Struct, frozen=True, eq=False, kw_only=True):
    """`factors` by the names of models.lora.adapter, in the row order of the model's checkpoint."""

    id: str
    rank: int
    scale: float
    factors: dict[str, Floats]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        there = {name.split(".")[2] for name in self.factors}
        return tuple(matrix for matrix in MATRICES if matrix in there)


def keep(folder: Path, cache: Path) -> str:
    """Copy an adapter's two files into the cache, and give the id that they have there. Raises UsageError (no adapter),
    Refused (too big)."""
    found = {name: _content(folder / name, most) for name, most in _FILES.items()}
    if (folder / PROVENANCE).is_file():
        found[PROVENANCE] = _content(folder / PROVENANCE, MOST_TENSOR_BYTES)
    text = hashlib.sha256()
    for name, content in found.items():
        text.update(f"{name} {len(content)}\n".encode() + content)
    adapter_id = text.hexdigest()[:32]
    kept = kept_at(adapter_id, cache)
    for name, content in found.items():
        if not (kept / name).exists():
            write_atomic(kept / name, content)
    return adapter_id


def kept_at(adapter_id: str, cache: Path) -> Path:
    return cache / "adapters" / adapter_id


def is_kept(adapter_id: str, cache: Path) -> bool:
    return all((kept_at(adapter_id, cache) / name).is_file() for name in _FILES)


_FILES: Final[Mapping[str, int]] = {CONFIG: MOST_CONFIG_BYTES, TENSORS: MOST_TENSOR_BYTES}


def _content(path: Path, most: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > most:
            raise Refused(f"{path}: {size} bytes, an adapter's may have {most}")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: {(error.strerror or str(error)).lower()}",
            try_=f"a folder with {CONFIG} and {TENSORS} (edgelam tune adapter JOB --output FOLDER)",
        ) from None


def load(adapter_id: str, config: LlamaConfig, cache: Path) -> Adapter:
    """A kept adapter, checked against a model. Raises UsageError (not kept any more), CorruptData (damaged), Refused
    (of another model, or of a kind that is not known here)."""
    folder = kept_at(adapter_id, cache)
    settings = _settings(folder / CONFIG)
    path = folder / TENSORS
    file = safetensors.open_safetensors(path)
    try:
        factors = from_peft(config, {name: file.float32(name) for name in file.tensors})
    except (KeyError, ValueError, IndexError):
        raise Refused(
            f"{path}: has tensors of matrices that no model here has", try_="LoRA on attention and feed-forward"
        ) from None
    _check(path, config, settings.r, factors)
    return Adapter(id=adapter_id, rank=settings.r, scale=settings.lora_alpha / settings.r, factors=factors)


def _settings(path: Path) -> _Config:
    try:
        found = msgspec.json.decode(_content(path, MOST_CONFIG_BYTES), type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptData(f"{path}: {error}", try_="an adapter in PEFT's layout") from None
    kinds = (
        (found.peft_type != "LORA", f"peft_type {found.peft_type}"),
        (found.bias != "none", f"bias {found.bias}"),
        (found.use_rslora, "use_rslora"),
        (found.use_dora, "use_dora"),
        (found.fan_in_fan_out, "fan_in_fan_out"),
        (bool(found.rank_pattern or found.alpha_pattern), "rank_pattern or alpha_pattern"),
        (bool(found.modules_to_save), "modules_to_save"),
    )
    strange = [text for is_so, text in kinds if is_so]
    if strange:
        raise Refused(f"{path}: {', '.join(strange)}: not known here", try_="plain LoRA: r, lora_alpha, target_modules")
    return found


def _check(path: Path, config: LlamaConfig, rank: int, factors: Mapping[str, Floats]) -> None:
    if not factors:
        raise Refused(f"{path}: has no factors", try_="an adapter in PEFT's layout")
    for name, values in factors.items():
        _, block, matrix, part = name.split(".")
        out, columns = sizes(config, cast(Matrix, matrix))
        wanted = (rank, columns) if part == "a" else (out, rank)
        if int(block) >= config.blocks or values.shape != wanted:
            raise Refused(
                f"{path}: {name} is {list(values.shape)}, "
                + (f"the model has {config.blocks} blocks" if int(block) >= config.blocks else f"not {list(wanted)}"),
                try_="the model that the adapter was trained for",
            )
        if not np.isfinite(values).all():
            raise CorruptData(f"{path}: {name} has values that are no numbers")
        if (name[:-1] + ("b" if part == "a" else "a")) not in factors:
            raise Refused(f"{path}: {name} has no other half")


def _check_base(folder: Path, base: str) -> None:
    """Raise Refused for an adapter that says that it is of another checkpoint."""
    if base and (folder / PROVENANCE).is_file():
        try:
            told = msgspec.json.decode((folder / PROVENANCE).read_bytes(), type=_Provenance).base
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptData(
                f"{folder / PROVENANCE}: {error}", try_="the adapter's folder, as it was written"
            ) from None
        if told and told != base:
            raise Refused(
                f"the adapter was trained for another checkpoint ({told[:19]}..., this model's is {base[:19]}...)",
                try_="the model that it was trained for",
            )


def laid_out(adapters: Sequence[Adapter]) -> Adapters:
    """How stages have these, in this order. Raises Refused for too many."""
    if len(adapters) > MAX_ADAPTERS or sum(adapter.rank for adapter in adapters) > MOST_WIDTH:
        raise Refused(
            f"{len(adapters)} adapters of rank {', '.join(str(adapter.rank) for adapter in adapters)} on one model",
            try_=f"at most {MAX_ADAPTERS}, of {MOST_WIDTH} ranks together",
        )
    used = {matrix for adapter in adapters for matrix in adapter.matrices}
    products = [
        (product, letters)
        for product, all_letters in PRODUCTS.items()
        if (letters := tuple(letter for letter in all_letters if letter in used))
    ]
    return Adapters(ranks=tuple((adapter.id, adapter.rank) for adapter in adapters), products=tuple(products))


def block_tensors(config: LlamaConfig, adapters: Sequence[Adapter], layout: Adapters, block: int) -> dict[str, Floats]:
    """The factors of a block, in the layout of models.engine.manifest.Adapters."""
    tensors = {info.name: np.zeros(info.shape, np.float32) for info in layout.weights_of(config, block)}
    for product, letters in layout.products:
        name = f"block.{block}.{product}"
        starts = _starts(config, product)
        for place, letter in enumerate(letters):
            for adapter in adapters:
                a = adapter.factors.get(f"block.{block}.{letter}.a")
                ranks = layout.columns(adapter.id)
                if a is None or ranks is None:
                    continue
                at = slice(place * layout.width + ranks.start, place * layout.width + ranks.stop)
                b = adapter.factors[f"block.{block}.{letter}.b"]
                tensors[f"{name}.lora_a"][:, at] = a.T
                rows = slice(starts[letter], starts[letter] + len(b))
                tensors[f"{name}.lora_b"][at, rows] = adapter.scale * b.T
    return tensors


def _starts(config: LlamaConfig, product: Product) -> dict[str, int]:
    """Where the rows of each letter begin in a product."""
    starts: dict[str, int] = {}
    start = 0
    for letter in PRODUCTS[product]:
        starts[letter] = start
        start += sizes(config, letter)[0]
    assert start == matrix_size(config, product)[0]
    return starts


def with_adapters(
    packed: Packed,
    ids: Sequence[str],
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    base: str = "",
) -> Packed:
    """A packed model with these kept adapters beside it, from the cache if they were laid out before. `progress` is
    called before each file with (done, all). `base` is the digest of the model's checkpoint. Raises what `load` and
    `laid_out` raise, and OSError."""
    config = packed.config
    for adapter_id in ids:
        _check_base(kept_at(adapter_id, cache), base)
    adapters = [load(adapter_id, config, cache) for adapter_id in ids]
    layout = laid_out(adapters)
    names = [f"lora-{block}" for block in range(config.blocks)]
    shape = msgspec.json.encode((config, layout))
    folder = cache / "packs" / f"lora-{hashlib.sha256(shape).hexdigest()[:32]}-v{PACK_VERSION}"
    files = known_files(folder, names)
    if files is None:
        files = []
        for block, name in enumerate(names):
            if progress is not None:
                progress(block, len(names))
            content = safetensors.to_bytes(block_tensors(config, adapters, layout, block))
            files.append(write_file(folder, name, content))
        finish(folder, files)
    modules = tuple(
        msgspec.structs.replace(
            module,
            artifacts=(*module.artifacts, files[int(module.name.removeprefix("block."))].digest),
            weight_bytes=module.weight_bytes + _bytes_of(layout, config),
        )
        if module.kind == "block"
        else module
        for module in packed.graph.modules
    )
    return Packed(
        graph=msgspec.structs.replace(packed.graph, modules=modules),
        files={**packed.files, **{file.digest: file.path(folder) for file in files}},
        config=config,
        adapters=layout,
    )


def _bytes_of(layout: Adapters, config: LlamaConfig) -> int:
    return sum(info.size_bytes for info in layout.weights_of(config, 0))
