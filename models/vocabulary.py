"""Tokenizers of the `tokenizers` library, built from what checkpoints carry, and the bytes behind each id.

A GGUF file names its pre-tokenizer; each name below stands for the rules that the model was trained with. A name that
isn't here is refused: a nearly right pre-tokenizer gives nearly right ids, and nobody notices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import tokenizers
from msgspec import Struct
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from models.formats.contents import GgufVocabulary, TokenizerJson
from wire.errors import CorruptData, Refused

_NORMAL: Final = 1
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_BYTE: Final = 6

_BYTE_TOKEN: Final = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
SPACE_LETTER: Final = "\u2581"
"""What SentencePiece writes for a space."""

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Encoders(Struct, frozen=True, kw_only=True):
    """One tokenizer in both its readings, and its tables."""

    trusted: tokenizers.Tokenizer
    """Takes special tokens in the text as special: for text that the chat template wrote."""
    plain: tokenizers.Tokenizer
    """Takes them as ordinary letters: for text that a user wrote."""
    specials: dict[str, int]
    pieces: list[bytes]
    """Bytes of each id; none for special tokens."""
    strip_first_space: bool
    """The tokenizer puts a space before every text, so decoding takes one away."""

    def text_of(self, number: int | None) -> str:
        """Give a token's text, '' for None or an unknown id."""
        if number is None or number < 0:
            return ""
        return self.trusted.id_to_token(number) or ""


def _byte_level(*before: pre_tokenizers.PreTokenizer, own_words: bool) -> pre_tokenizers.PreTokenizer:
    """Bytes as letters, after `before`; with GPT-2's word pattern unless `before` has split the words."""
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_words)])


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(f"{_CONTRACTIONS}|{_WORDS}|{digits}|{_REST}")
    return _byte_level(pre_tokenizers.Split(pattern, behavior="isolated"), own_words=False)


class _Rules(Struct, frozen=True, kw_only=True):
    words: Callable[[], pre_tokenizers.PreTokenizer]
    normalise: bool = False
    """To NFC, as Qwen does."""
    whole_words: bool = False
    """A word that is in the vocabulary is that token, whatever the merges say (tiktoken's way, Llama 3)."""


_GPT2: Final = _Rules(words=lambda: _byte_level(own_words=True))
_LLAMA3: Final = _Rules(words=lambda: _split(r"\p{N}{1,3}"), whole_words=True)
PRE_TOKENIZERS: Final[Mapping[str, _Rules]] = {
    "smollm": _Rules(words=lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True), own_words=True)),
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "qwen2": _Rules(words=lambda: _split(r"\p{N}"), normalise=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def from_gguf(vocabulary: GgufVocabulary, bos_id: int | None) -> Encoders:
    """Build from a GGUF file's lists. Raises Refused (unknown pre-tokenizer), CorruptData (lists that don't fit)."""
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):
        raise CorruptData("tokenizer: a token is listed twice")
    build = _byte_level_bpe if vocabulary.model == "gpt2" else _sentencepiece_bpe
    trusted, plain = _built(build, vocabulary, bos_id), _built(build, vocabulary, bos_id)
    return _encoders(trusted, plain, vocabulary.model == "gpt2", vocabulary.add_space_prefix)


def _built(
    build: Callable[[GgufVocabulary], tokenizers.Tokenizer], vocabulary: GgufVocabulary, bos_id: int | None
) -> tokenizers.Tokenizer:
    try:
        tokenizer = build(vocabulary)
    except Refused:
        raise
    except Exception as error:  # the library raises bare Exception for all that it finds wrong
        raise CorruptData(f"tokenizer: {error}") from error
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    tokenizer.add_tokens(
        [
            AddedToken(text, special=kind != _USER_DEFINED, normalized=False)
            for text, kind in kinds
            if text and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    if vocabulary.add_bos and bos_id is not None and 0 <= bos_id < len(vocabulary.tokens):
        bos = vocabulary.tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return tokenizer


def _byte_level_bpe(vocabulary: GgufVocabulary) -> tokenizers.Tokenizer:
    rules = PRE_TOKENIZERS.get(vocabulary.pre)
    if rules is None:
        raise Refused(
            f"pre-tokenizer {vocabulary.pre!r} is not supported ({', '.join(PRE_TOKENIZERS)} are)",
            try_="the same model with its tokenizer.json (hf:OWNER/NAME)",
        )
    merges = [_pair(merge) for merge in vocabulary.merges]
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=numbers, merges=merges, ignore_merges=rules.whole_words))
    if rules.normalise:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rules.words()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece_bpe(vocabulary: GgufVocabulary) -> tokenizers.Tokenizer:
    """SentencePiece joins the neighbours whose join has the best score: merges in order of their result's score."""
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    kinds, scores = vocabulary.types, vocabulary.scores
    joinable = {token for token, kind in zip(vocabulary.tokens, kinds, strict=True) if kind == _NORMAL}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token in joinable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in joinable and right in joinable:
                ranked.append((-scores[numbers[token]], numbers[left], numbers[right], (left, right)))
    ranked.sort()
    unknown = vocabulary.unknown_id
    unknown_text = vocabulary.tokens[unknown] if unknown is not None and 0 <= unknown < len(vocabulary.tokens) else None
    has_bytes = _BYTE in kinds
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=numbers,
            merges=[pair for _, _, _, pair in ranked],
            unk_token=unknown_text,
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_LETTER)]
    if vocabulary.add_space_prefix:
        steps.insert(0, normalizers.Prepend(SPACE_LETTER))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


class _Step(Struct, frozen=True):
    type: str
    content: str = ""
    start: int = 0
    decoders: list[_Step] = []


class _File(Struct, frozen=True):
    decoder: _Step | None = None


def from_json(data: TokenizerJson) -> Encoders:
    """Build from tokenizer.json. Raises CorruptData, or Refused for a kind whose ids don't stand for bytes."""
    try:
        decoder = msgspec.json.decode(data.text, type=_File).decoder
        trusted, plain = (tokenizers.Tokenizer.from_str(data.text) for _ in range(2))
    except Exception as error:  # the library raises bare Exception for all that it finds wrong
        raise CorruptData(f"tokenizer.json: {error}") from error
    steps = [] if decoder is None else [decoder, *decoder.decoders]
    kinds = [step.type for step in steps]
    if "ByteLevel" not in kinds and "ByteFallback" not in kinds:
        raise Refused(f"tokenizer.json with decoder {kinds or 'none'} is not supported (ByteLevel, ByteFallback are)")
    for tokenizer in (trusted, plain):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    strip = any(step.type == "Strip" and step.content == " " and step.start > 0 for step in steps)
    return _encoders(trusted, plain, "ByteLevel" in kinds, strip)


def _encoders(
    trusted: tokenizers.Tokenizer, plain: tokenizers.Tokenizer, byte_level: bool, strip_first_space: bool
) -> Encoders:
    plain.encode_special_tokens = True
    added = trusted.get_added_tokens_decoder()
    specials = {token.content: number for number, token in added.items() if token.special}
    for text in specials:
        if len(text) < 2:
            raise Refused(f"a special token of one letter ({text!r}) is not supported: users type it")
    numbers = trusted.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(numbers.values(), default=-1) + 1)
    as_bytes = _letters_as_bytes if byte_level else _fallback_as_bytes
    for text, number in numbers.items():
        if text not in specials:
            pieces[number] = text.encode() if number in added else as_bytes(text)
    return Encoders(trusted=trusted, plain=plain, specials=specials, pieces=pieces, strip_first_space=strip_first_space)


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    printable: Sequence[int] = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF_LETTER: Final = _byte_of_letter()


def _letters_as_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_LETTER[letter] for letter in token)
    except KeyError:
        return token.encode()  # not in the alphabet, so it stands for its own text


def _fallback_as_bytes(token: str) -> bytes:
    found = _BYTE_TOKEN.match(token)
    return bytes([int(found[1], 16)]) if found else token.replace(SPACE_LETTER, " ").encode()
