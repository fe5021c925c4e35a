"""A net as far as one of its tensors, which then is a picture's features."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from models.catalog import find
from models.items.cuts import live_at_cuts
from models.items.ends import picture_size, width_of
from models.items.pack import PackedItems
from wire.limits import MAX_FEATURES
from wire.samples import Images

SAID: Final = 5
"""Tensors that are named where another one was."""


class FeaturesPart(Struct, frozen=True, kw_only=True):
    graph: bytes
    files: Mapping[str, Path]
    """Weights by digest."""
    hidden: int
    shape: tuple[int, ...]
    """Of the tensor that is a picture's features."""
    widest_bytes: int
    """The largest tensor on the way."""

    @property
    def digest(self) -> str:
        """A name for what it computes."""
        made = hashlib.sha256(self.graph)
        for digest in sorted(self.files):
            made.update(digest.encode())
        return f"sha256:{made.hexdigest()}"


def features_tensor(model: str, images: Images) -> str:
    """Name of the tensor that pictures' features are: as it is said, or the catalog's for the model."""
    entry = find(model)
    return images.features or (entry.features if entry is not None else "")


def features_part(packed: PackedItems, tensor: str) -> FeaturesPart:
    """What of a net makes a tensor. Raises ValueError, with words for people, where there is none of that name, or a
    picture has no vector there."""
    net = packed.parts.net
    given = packed.config.inputs
    if len(given) != 1 or picture_size(given[0]) is None:
        raise ValueError(f"model: {packed.graph.model} takes no pictures: one tensor of 1 x 3 x height x width is due")
    places = {name: place for place, node in enumerate(net.nodes) for name in node.gives}
    fitting = [name for name in places if name in net.ports and width_of(net.ports[name]) is not None]
    if tensor not in places or tensor not in net.ports or width_of(net.ports[tensor]) is None:
        said = ", ".join(fitting[-SAID:]) or "none that fits"
        raise ValueError(f"images.features: {tensor!r} is no tensor with a vector; the last of them: {said}")
    hidden = width_of(net.ports[tensor])
    assert hidden is not None
    if hidden > MAX_FEATURES:
        raise ValueError(f"images.features: {tensor!r} has {hidden} numbers, at most {MAX_FEATURES} are taken")
    end = places[tensor] + 1
    crossing = live_at_cuts(net.nodes[:end], [port.name for port in net.given], [tensor])
    graph, _ = net.run_of(0, end, crossing)
    digests = [
        digest
        for module, begin in zip(packed.graph.modules, packed.parts.begins, strict=True)
        for digest in module.artifacts
        if begin < end
    ]
    sizes = [net.ports[name].size_bytes(1) for node in net.nodes[:end] for name in node.gives if name in net.ports]
    return FeaturesPart(
        graph=graph,
        files={digest: packed.files[digest] for digest in digests},
        hidden=hidden,
        shape=net.ports[tensor].shape,
        widest_bytes=max(sizes),
    )
