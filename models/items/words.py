"""Text -> token ids for a sentence encoder, by the tokenizer.json beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import tokenizers

from wire.errors import CorruptData

MAX_TOKENIZER_BYTES: Final = 64 * 1024 * 1024
"""Of the largest vocabularies some 20 MB."""
MAX_TEXT_CHARS: Final = 1 << 20
"""Of one text; what is longer than this is longer than any encoder takes."""


class WordTokenizer:
    """Safe to share between threads."""

    def __init__(self, data: bytes, where: str) -> None:
        """Raises CorruptData. What the file says of cutting and padding is left out: what is too long is refused."""
        self._data = data
        try:
            self._encoder = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises no narrower kind
            raise CorruptData(f"{where}: not a tokenizer: {str(error)[:300]}") from error
        self._encoder.no_truncation()
        self._encoder.no_padding()

    @staticmethod
    def beside(path: Path) -> WordTokenizer | None:
        """The tokenizer of a folder, or in the folder of a file; None if there is none. Raises OSError, CorruptData."""
        file = (path if path.is_dir() else path.parent) / "tokenizer.json"
        if path.suffix == ".onnx" or not file.is_file():
            return None
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CorruptData(f"{file}: {file.stat().st_size} bytes are no tokenizer")
        return WordTokenizer(file.read_bytes(), str(file))

    def to_json(self) -> str:
        """tokenizer.json, as it came."""
        return self._data.decode()

    def encode(self, text: str) -> list[int]:
        """Ids with the special tokens of the model around them."""
        return list(self._encoder.encode(text).ids)
