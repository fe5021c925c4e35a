"""An item model becomes a graph of modules, with one file of weights for each, named by content, kept in a cache.

The first module takes the item and is called `embedding`, the last gives the answer and is called `head`, those between
are blocks: as for language models, so that plans, orders and pins mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from models.build.kit import KitEntry
from models.cache import file_digest
from models.formats import safetensors
from models.formats.bert import is_bert, read_bert_config
from models.graph import Edge, Graph, Items, Module, ModuleKind
from models.items.bert import build_bert
from models.items.cuts import chosen_cuts, live_at_cuts
from models.items.manifest import ItemManifest, Port, bundle_bytes, check_size
from models.items.net import TYPICAL_ROWS, Net, net_of, open_net
from models.packed import PackedFile, finish, known_files, write_file
from wire.limits import MAX_PROMPT_TOKENS

PACK_VERSION: Final = 2
"""Grows when the same model would give other bytes."""
FAMILY: Final = "items"
MOST_ROWS: Final = 512
"""Of an item of a model that does not say how many it takes."""


class ItemConfig(Struct, frozen=True, kw_only=True):
    """What goes in and comes out."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    most_rows: int
    labels: tuple[str, ...] = ()
    """Whose shares the output is, of an encoder with a task module."""


class PackedItems(Struct, frozen=True, kw_only=True):
    """An item model ready to be handed out: its graph, where each artifact lies (digest -> file), and how it is cut."""

    graph: Graph
    files: dict[str, Path]
    config: ItemConfig
    parts: ItemParts


class ItemParts:
    """A net and its cuts: any run of its modules as a stage's graph."""

    def __init__(self, net: Net) -> None:
        self.net = net
        given, wanted = [port.name for port in net.given], [port.name for port in net.wanted]
        self.crossing = live_at_cuts(net.nodes, given, wanted)
        rows = TYPICAL_ROWS if net.has_rows else 1
        sizes = {name: port.size_bytes(rows) for name, port in net.ports.items()}
        self.ends = [*chosen_cuts(net.nodes, self.crossing, sizes), len(net.nodes)]
        self.begins = [0, *self.ends[:-1]]

    def __len__(self) -> int:
        return len(self.ends)

    def graph_of(self, first: int, end: int) -> tuple[bytes, ItemManifest]:
        """Modules `first` to `end - 1` as a graph without weights."""
        return self.net.run_of(self.begins[first], self.ends[end - 1], self.crossing)

    def stage_graph(self, embedding: bool, first_block: int, end_block: int, head: bool) -> bytes:
        """The graph of a stage as plans name it."""
        first = 0 if embedding else first_block + (1 if len(self) > 1 else 0)
        end = len(self) if head else end_block + 1
        return self.graph_of(first, end)[0]

    def widest_bytes(self) -> int:
        """Of all that an item sends over a cut or takes with it at the start, at most."""
        rows = self.net.most_rows if self.net.has_rows else 1
        crossing = [self.crossing[place] for place in (*self.begins, len(self.net.nodes))]
        return max(bundle_bytes([self.net.ports[name] for name in names], rows) for names in crossing)

    def names(self) -> list[str]:
        last = len(self) - 1
        return ["head" if i == last else "embedding" if i == 0 else f"block.{i - 1}" for i in range(len(self))]


def is_item_file(path: Path) -> bool:
    """Whether a path is an item model's: an ONNX file, or a folder or file of a sentence encoder."""
    return path.suffix == ".onnx" or _encoder_folder(path) is not None


def _encoder_folder(path: Path) -> Path | None:
    folder = path if path.is_dir() else path.parent if path.name == "model.safetensors" else None
    return folder if folder is not None and is_bert(folder) else None


def pack_items(path: Path, name: str, cache: Path) -> PackedItems:
    """Give the packed model, its weights from `cache` if they are there. Raises what reading it raises, Refused for a
    model that can't be cut so that every item fits a message, and OSError when the cache can't be written."""
    folder = _encoder_folder(path)
    labels: tuple[str, ...] = ()
    if folder is None:
        digest = file_digest(path, cache)
        net = open_net(path, MOST_ROWS)
        labels = net.labels
    else:
        digest = file_digest(folder / "model.safetensors", cache)
        config = read_bert_config(folder)
        labels = config.edgelam_labels
        net = net_of(build_bert(folder), name, config.max_position_embeddings)
    parts = ItemParts(net)
    kept = pack_folder(digest, cache)
    graphs = [parts.graph_of(index, index + 1) for index in range(len(parts))]
    for _, manifest in graphs:
        check_size(manifest.inputs, net.most_rows if net.has_rows else 1, f"{name}: what crosses a cut")
    check_size(graphs[-1][1].outputs, net.most_rows if net.has_rows else 1, f"{name}: what comes out")
    weighty = [module for module, (_, manifest) in zip(parts.names(), graphs, strict=True) if manifest.weights]
    files = known_files(kept, weighty)
    if files is None:
        files = _write(parts, kept)
    net.forget_weights()
    config_of = ItemConfig(inputs=tuple(net.given), outputs=tuple(net.wanted), most_rows=net.most_rows, labels=labels)
    graph = _graph(name, parts, graphs, files)
    return PackedItems(
        graph=graph, files={file.digest: file.path(kept) for file in files}, config=config_of, parts=parts
    )


def pack_folder(digest: str, cache: Path) -> Path:
    """Where a model whose file has this digest is packed."""
    return cache / "packs" / f"{digest.removeprefix('sha256:')[:32]}-items-v{PACK_VERSION}"


def kit_of_items(packed: PackedItems) -> list[KitEntry]:
    """Each kind of module once, for boards to time."""
    entries: dict[str, KitEntry] = {}
    for index, module in enumerate(packed.graph.modules):
        if module.profile_key not in entries:
            entries[module.profile_key] = KitEntry(
                key=module.profile_key,
                kind=module.kind,
                graphs={1: packed.parts.graph_of(index, index + 1)[0]},
                hidden=1,
                vocabulary=1,
                wire_dtype="f32",
                runs="items",
            )
    return list(entries.values())


def _graph(
    name: str, parts: ItemParts, graphs: Sequence[tuple[bytes, ItemManifest]], files: Sequence[PackedFile]
) -> Graph:
    net, names = parts.net, parts.names()
    rows = min(TYPICAL_ROWS, net.most_rows) if net.has_rows else 1
    digests = {file.name: file.digest for file in files}
    modules = []
    for index, module in enumerate(names):
        begin, end = parts.begins[index], parts.ends[index]
        kind: ModuleKind = "block" if module.startswith("block.") else "head" if module == "head" else "embedding"
        weights = sum(info.size_bytes for info in graphs[index][1].weights)
        modules.append(
            Module(
                name=module,
                kind=kind,
                profile_key=f"items/{net.likeness(begin, end, parts.crossing)}/f32",
                weight_bytes=weights + net.inline_bytes(begin, end),
                artifacts=(digests[module],) if module in digests else (),
                kv_bytes_per_token=0,
                macs_per_token=net.macs_of(begin, end, rows),
            )
        )
    return Graph(
        model=name,
        family=FAMILY,
        precision="f32",
        wire_dtype="f32",
        hidden=1,
        vocabulary=1,
        blocks=sum(module.kind == "block" for module in modules),
        max_context_tokens=MAX_PROMPT_TOKENS,
        modules=tuple(modules),
        edges=tuple(_edges(parts, rows)),
        items=Items(
            rows=rows,
            input_bytes=bundle_bytes(net.given, rows),
            output_bytes=bundle_bytes(net.wanted, rows),
        ),
    )


def _edges(parts: ItemParts, rows: int) -> list[Edge]:
    """Each tensor from the module that makes it to each one that takes it; what is given comes from the first."""
    net, names = parts.net, parts.names()
    made = {port.name: 0 for port in net.given}
    taken: dict[str, set[int]] = {}
    for index, (begin, end) in enumerate(zip(parts.begins, parts.ends, strict=True)):
        for node in net.nodes[begin:end]:
            for name in node.takes:
                taken.setdefault(name, set()).add(index)
            made.update(dict.fromkeys(node.gives, index))
    for port in net.wanted:
        taken.setdefault(port.name, set()).add(len(parts) - 1)
    edges = []
    for name, targets in taken.items():
        for target in sorted(targets - {made[name]}):
            port = net.ports[name]
            size = bundle_bytes([port], rows)
            edges.append(
                Edge(
                    source=names[made[name]],
                    target=names[target],
                    elements_per_token=size,
                    bytes_per_token=size,
                    tensor=name,
                )
            )
    return edges


def _write(parts: ItemParts, folder: Path) -> list[PackedFile]:
    files = []
    for name, begin, end in zip(parts.names(), parts.begins, parts.ends, strict=True):
        weights = parts.net.weights_of(begin, end)
        if not weights:
            continue
        content = safetensors.to_bytes(weights)
        files.append(write_file(folder, name, content))
    finish(folder, files)
    return files
