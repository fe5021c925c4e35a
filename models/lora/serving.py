"""Adapters beside a packed model: read from PEFT's files, checked, kept by content, laid out for stages.

    <cache>/adapters/<id>/         adapter_config.json, adapter_model.safetensors: a copy that nobody changes, since a
                                   deployment that comes back after a restart needs what it had
    <cache>/packs/<...>-lora-<id>  the factors of all adapters of a deployment, a file for each block

The scale of an adapter is in its B.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Final, cast

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from models.build.pack import Packed
from models.cache import write_atomic
from models.engine.manifest import Adapters, Product
from models.families.bert import BertConfig
from models.families.config import LlamaConfig, matrix_size
from models.formats import safetensors
from models.lora.adapter import HEAD_FILE, MATRICES, Config, from_peft, sizes
from models.lora.head import MOST_HEAD_BYTES
from models.lora.whole import tensors_of
from models.packed import finish, known_files, write_file
from wire.errors import CorruptData, Refused, UsageError
from wire.limits import MAX_ADAPTER_RANK, MAX_ADAPTERS
from wire.messages import Matrix

Floats = npt.NDArray[np.float32]

CONFIG: Final = "adapter_config.json"
TENSORS: Final = "adapter_model.safetensors"
BLOCKS: Final = "EDGELAM_BLOCKS"
"""`peft_type` where it is no adapter: the file has weights that were trained themselves, by a checkpoint's names."""
PROVENANCE: Final = "provenance.json"
"""Beside adapters that were trained here."""

MOST_CONFIG_BYTES: Final = 1 << 20
MOST_TENSOR_BYTES: Final = 1 << 30
MOST_PROVENANCE_BYTES: Final = 1 << 26
SHOWN: Final = 8
"""Letters of an adapter's id in the name of a model that was made with it."""
MOST_WIDTH: Final = 512
"""Ranks of all adapters of a deployment."""

UNKNOWN: Final = (
    "use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "modules_to_save", "alora_invocation_tokens", "trainable_token_indices",
)  # fmt: skip
"""Settings with which PEFT would give another answer than the plain product."""

LARGEST: Final = 1e4
"""In a factor, its scale included. The products of all adapters are made for all rows, and what a row takes no part in
counts zero times: that must be zero, so nothing may overflow."""

MOST_PACKS: Final = 32
"""Sets of adapters that stay laid out; those used longest ago are removed."""

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
    use_rslora: Any = False
    use_dora: Any = False
    use_qalora: Any = False
    lora_bias: Any = False
    fan_in_fan_out: Any = False
    rank_pattern: Any = None
    alpha_pattern: Any = None
    modules_to_save: Any = None
    alora_invocation_tokens: Any = None
    trainable_token_indices: Any = None


class _Provenance(Struct, frozen=True, kw_only=True):
    """What counts of a provenance.json of ours (docs/tuning.md)."""

    base: str = ""
    """Digest of the checkpoint; '' if it is not said."""
    personal: bool = False
    """B is zeros: boards that took part have their own."""


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
    """Copy an adapter's two files into the cache, with its task module if it has one and the checkpoint that it says it
    is of, and give the id that they have there: equal for equal ones. A task module may be alone. Raises UsageError (no
    adapter), Refused (too big), CorruptData."""
    alone = (folder / HEAD_FILE).is_file() and not any((folder / name).exists() for name in _FILES)
    found = {} if alone else {name: _content(folder / name, most) for name, most in _FILES.items()}
    if (folder / HEAD_FILE).is_file():
        found[HEAD_FILE] = _content(folder / HEAD_FILE, MOST_HEAD_BYTES)
    if (folder / PROVENANCE).is_file():
        told = _provenance_of(folder / PROVENANCE)
        if told.personal:
            raise Refused(
                "the adapter has no B: each board that took part has its own, and keeps it",
                try_="a copy of adapters/tune-JOB in a board's state folder: --adapter ./FOLDER (docs/tuning.md)",
            )
        found[PROVENANCE] = msgspec.json.encode(_Provenance(base=told.base))
    text = hashlib.sha256()
    for name, content in found.items():
        text.update(f"{name} {len(content)}\n".encode() + content)
    adapter_id = text.hexdigest()[:32]
    kept = kept_at(adapter_id, cache)
    for name, content in found.items():
        if not (kept / name).is_file() or (kept / name).stat().st_size != len(content):
            write_atomic(kept / name, content)
    return adapter_id


def kept_at(adapter_id: str, cache: Path) -> Path:
    return cache / "adapters" / adapter_id


def is_kept(adapter_id: str, cache: Path) -> bool:
    kept = kept_at(adapter_id, cache)
    return all((kept / name).is_file() for name in _FILES) or is_alone(kept)


def is_alone(kept: Path) -> bool:
    """Whether a kept one is a task module, and no adapter beside it."""
    return (kept / HEAD_FILE).is_file() and not (kept / CONFIG).is_file()


_FILES: Final[Mapping[str, int]] = {CONFIG: MOST_CONFIG_BYTES, TENSORS: MOST_TENSOR_BYTES}


def _content(path: Path, most: int) -> bytes:
    try:
        found = path.stat()
        if not S_ISREG(found.st_mode):
            raise UsageError(f"{path}: no file", try_=f"a folder with {CONFIG} and {TENSORS}")
        size = found.st_size
        if size > most:
            raise Refused(f"{path}: {size} bytes, an adapter's may have {most}")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: {(error.strerror or str(error)).lower()}",
            try_=f"a folder with {CONFIG} and {TENSORS} (edgelam tune adapter JOB --output FOLDER)",
        ) from None


def weights_in(adapter_id: str, config: BertConfig, cache: Path) -> dict[str, Floats]:
    """The weights of all blocks by a checkpoint's names, where a kept one has these and no factors; else none. Raises
    what `load` raises."""
    folder = kept_at(adapter_id, cache)
    if _config_of(folder / CONFIG).peft_type != BLOCKS:
        return {}
    path = folder / TENSORS
    file, wanted = safetensors.open_safetensors(path), dict(tensors_of(config)).values()
    if set(file.tensors) != {tensor.file_name for tensor in wanted}:
        raise Refused(f"{path}: has not the weights of this model's blocks", try_="the model that was trained")
    found = {tensor.file_name: np.array(file.float32(tensor.file_name), np.float32) for tensor in wanted}
    for tensor in wanted:
        values = found[tensor.file_name]
        if values.shape != tensor.shape or not np.isfinite(values).all():
            raise CorruptData(
                f"{path}: {tensor.file_name} is {list(values.shape)}, finite numbers {list(tensor.shape)} are due",
                try_="the weights as they were written",
            )
    return found


def load(adapter_id: str, config: Config, cache: Path) -> Adapter:
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
    scale = settings.lora_alpha / settings.r
    _check(path, config, settings.r, scale, factors)
    return Adapter(id=adapter_id, rank=settings.r, scale=scale, factors=factors)


def _config_of(path: Path) -> _Config:
    if is_alone(path.parent):
        raise Refused(
            "it tells labels of readings or pictures, and is no adapter", try_="edgelam label FILE --adapter JOB"
        )
    try:
        return msgspec.json.decode(_content(path, MOST_CONFIG_BYTES), type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptData(f"{path}: {error}", try_="an adapter in PEFT's layout") from None


def _settings(path: Path) -> _Config:
    found = _config_of(path)
    strange = [f"peft_type {found.peft_type}"] if found.peft_type != "LORA" else []
    strange += [f"bias {found.bias}"] if found.bias != "none" else []
    strange += [name for name in UNKNOWN if getattr(found, name)]
    if strange:
        raise Refused(f"{path}: {', '.join(strange)}: not known here", try_="plain LoRA: r, lora_alpha, target_modules")
    return found


def _check(path: Path, config: Config, rank: int, scale: float, factors: Mapping[str, Floats]) -> None:
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
        largest = float(np.abs(values).max(initial=0)) * (scale if part == "b" else 1.0)
        if largest > LARGEST:
            raise Refused(
                f"{path}: {name} has values up to {largest:.3g}, at most {LARGEST:g} are taken", try_="train it anew"
            )
        if (name[:-1] + ("b" if part == "a" else "a")) not in factors:
            raise Refused(f"{path}: {name} has no other half")


def check_base(folder: Path, base: str) -> None:
    """Raise Refused for an adapter that says that it is of another checkpoint."""
    if not base or not (folder / PROVENANCE).is_file():
        return
    told = _provenance_of(folder / PROVENANCE).base
    if told and told != base:
        raise Refused(
            f"the adapter was trained for another checkpoint ({told[:19]}..., this model's is {base[:19]}...)",
            try_="the model that it was trained for",
        )


def _provenance_of(path: Path) -> _Provenance:
    try:
        return msgspec.json.decode(_content(path, MOST_PROVENANCE_BYTES), type=_Provenance)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptData(f"{path}: {error}", try_="the adapter as it was written") from None


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
        check_base(kept_at(adapter_id, cache), base)
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
        _remove_old(folder.parent)
    (folder / "index.json").touch()
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


def _remove_old(packs: Path) -> None:
    """Of the sets that are laid out, those that were used longest ago."""
    used = []
    for folder in packs.glob("lora-*"):
        with contextlib.suppress(OSError):
            used.append(((folder / "index.json").stat().st_mtime_ns, folder))
    for _, folder in sorted(used)[:-MOST_PACKS]:
        shutil.rmtree(folder, ignore_errors=True)


def _bytes_of(layout: Adapters, config: LlamaConfig) -> int:
    return sum(info.size_bytes for info in layout.weights_of(config, 0))
