"""What of tensors a picture and its features are: for boards, too, which have no ONNX library."""

from __future__ import annotations

from models.items.manifest import ItemManifest, Port


def picture_size(port: Port) -> tuple[int, int] | None:
    """Height and width of the picture that a tensor is, if it is one."""
    if port.dtype != "f32" or len(port.shape) != 4 or port.shape[:2] != (1, 3) or not all(port.shape):
        return None
    return port.shape[2], port.shape[3]


def width_of(port: Port) -> int | None:
    """Numbers of a picture's vector: [1, hidden], [1, rows, hidden] or, of convolutions, [1, hidden, height, width]."""
    if port.dtype != "f32" or len(port.shape) not in (2, 3, 4) or port.shape[0] != 1 or not all(port.shape):
        return None
    return port.shape[1] if len(port.shape) == 4 else port.shape[-1]


def ends_of(manifest: ItemManifest) -> tuple[tuple[int, int], int]:
    """Height and width of the picture that goes into such a part, and numbers of the vector that comes out. Raises
    ValueError for a part that is none."""
    if len(manifest.inputs) != 1 or len(manifest.outputs) != 1:
        raise ValueError("a graph that takes no picture, or gives more than features")
    size, hidden = picture_size(manifest.inputs[0]), width_of(manifest.outputs[0])
    if size is None or hidden is None:
        raise ValueError("a graph that takes no picture, or gives no vector")
    return size, hidden
