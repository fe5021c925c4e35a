"""A device's own pictures, in folders that are called like their labels; read with Pillow, which nobody else needs.

    photos/cat/1.png  photos/cat/2.jpg  photos/dog/1.png

What can't be decoded, is larger than the job wants, or lies in a folder of another name is counted and left out.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from models.training.data import MAX_ROWS, BadRow
from models.training.samples import IGNORED
from wire.errors import CorruptData, UsageError
from wire.samples import Images

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

KINDS: Final = (".png", ".jpg", ".jpeg")
FORMATS: Final = ("PNG", "JPEG")
MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Of Pillow, with 8 bits for a colour: of others a conversion would cut the light off."""
INDEXED: Final = ("1", "P", "PA")
"""Of these, whose numbers are no amounts of light."""
MAX_FILE_BYTES: Final = 256 << 20


class Picture(NamedTuple):
    """`label`: its place among the job's, or IGNORED."""

    file: Path
    label: int

    @property
    def where(self) -> str:
        return f"{self.file.parent.name}/{self.file.name}"


def pictures(path: Path, labels: Sequence[str], keep_all: bool = False) -> Iterator[Picture | BadRow]:
    """All files under a path that are pictures by their names, in order. With `keep_all` those with another label are
    no bad rows. Raises UsageError for what can't be read, CorruptData where there are no folders of labels."""
    place = {label: number for number, label in enumerate(labels)}
    count = 0
    try:
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
        if not folders:
            raise CorruptData(f"data {path.name}: no folders of labels in it", try_="a folder for each label")
        for folder in folders:
            label = place.get(folder.name, IGNORED)
            for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in KINDS and file.is_file()):
                count += 1
                if count > MAX_ROWS:
                    raise UsageError(f"data {path.name}: more than {MAX_ROWS} pictures", try_="fewer")
                found = Picture(file, label)
                bad = label == IGNORED and not keep_all
                yield BadRow(found.where, "its label is none of the job's") if bad else found
    except OSError as error:
        raise UsageError(f"data {path}: {(error.strerror or str(error)).lower()}", try_="see --data") from None


def pixels_of(picture: Picture, images: Images, width: int, height: int) -> Floats | BadRow:
    """[3, height, width] of `fitted`, as the net wants it."""
    found = fitted(picture, images.most_pixels, width, height)
    if isinstance(found, BadRow):
        return found
    values = found.transpose(1, 2, 0).astype(np.float32) / 255
    values = (values - np.array(images.mean, np.float32)) / np.array(images.deviation, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)


def fitted(picture: Picture, most_pixels: int, width: int, height: int) -> Bytes | BadRow:
    """[3, height, width] red, green and blue from the middle of a picture, scaled to fit. Nothing is decoded of a file
    that says it is larger. Raises UsageError where there is no Pillow."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UsageError(
            "there is no Pillow here to read pictures with", try_="pip install 'edgelam[images]'"
        ) from None
    try:
        size = picture.file.stat().st_size
        if size > MAX_FILE_BYTES:
            return BadRow(picture.where, f"{size} bytes, at most {MAX_FILE_BYTES} are read")
        with warnings.catch_warnings():
            # Pillow's own bound is another one; ours is looked at before a pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(picture.file, formats=FORMATS)
        with opened as image:
            if image.width * image.height > most_pixels:
                return BadRow(picture.where, f"{image.width} x {image.height}, at most {most_pixels} pixels")
            if image.mode not in MODES:
                return BadRow(picture.where, f"has colours as {image.mode}, with more than 8 bits")
            image.draft("RGB", (width, height))  # a JPEG of more than twice that is decoded at half its size, or less
            ImageOps.exif_transpose(image, in_place=True)
            mixable = image.convert("RGB") if image.mode in INDEXED else image
            scaled = ImageOps.fit(mixable, (width, height), method=Image.Resampling.BILINEAR)
            return np.ascontiguousarray(np.asarray(scaled.convert("RGB"), np.uint8).transpose(2, 0, 1))
    except Image.DecompressionBombError as error:
        return BadRow(picture.where, str(error))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, MemoryError) as error:
        return BadRow(picture.where, f"no picture: {error}")
