"""Make the reference for tokenizers of SentencePiece kind: a small model trained by `sentencepiece` itself.

Run by hand, in an environment of its own:

    pip install sentencepiece
    python tools/sentencepiece_reference.py LICENSE tests/models/golden/sentencepiece_reference.json

The document holds the vocabulary as a GGUF file would (tokens, scores, types), and texts with their ids.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Final

import sentencepiece

VOCABULARY: Final = 480
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
TEXTS: Final = (
    "You may reproduce and distribute copies of the Work",
    "  leading and   inner spaces ",
    "line\nbreak\ttab",
    "Ärger 漢字 🙂",
    "2024 x 3.14",
    "unseenword zzz",
    "a",
    "",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(given.corpus.read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = range(pieces.get_piece_size())
    document = {
        "made_by": {"sentencepiece": sentencepiece.__version__},
        "tokens": [pieces.id_to_piece(number) for number in numbers],
        "scores": [pieces.get_score(number) for number in numbers],
        "types": [_kind(pieces, number) for number in numbers],
        "texts": [
            {"text": text, "ids": pieces.encode(text), "decoded": pieces.decode(pieces.encode(text))} for text in TEXTS
        ],
    }
    given.out.write_text(json.dumps(document) + "\n")


def _kind(pieces: sentencepiece.SentencePieceProcessor, number: int) -> int:
    if pieces.is_unknown(number):
        return UNKNOWN
    if pieces.is_control(number):
        return CONTROL
    return BYTE if pieces.is_byte(number) else NORMAL


if __name__ == "__main__":
    main()
