"""Tokenizers: ids equal those of the libraries the models were made with, and text survives the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from models.cache import cache_dir
from models.catalog import CATALOG, is_cached
from models.formats.checkpoint import open_checkpoint
from models.formats.contents import GgufVocabulary, TokenizerJson
from models.text import Tokenizer
from models.vocabulary import PRE_TOKENIZERS, SPACE_LETTER, from_gguf, from_json
from tests.models.tiny import (
    MERGES,
    SPECIALS,
    random_tensors,
    tiny_config,
    tiny_tokenizer,
    vocabulary_tokens,
    write_gguf,
    write_hf,
)
from wire.errors import CorruptData, Refused, UsageError

GOLDEN = Path(__file__).parent / "golden"
SENTENCEPIECE = json.loads((GOLDEN / "sentencepiece_reference.json").read_text())
SMOLLM2 = json.loads((GOLDEN / "smollm2_reference.json").read_text())


def _byte_level(**changes: Any) -> GgufVocabulary:
    tokens = vocabulary_tokens()
    vocabulary = GgufVocabulary(
        model="gpt2",
        pre="smollm",
        tokens=tokens,
        types=[3 if token in SPECIALS else 1 for token in tokens],
        scores=[0.0] * len(tokens),
        merges=list(MERGES),
        add_bos=False,
        add_space_prefix=False,
        unknown_id=0,
    )
    return structs.replace(vocabulary, **changes)


def _sentencepiece(**changes: Any) -> GgufVocabulary:
    vocabulary = GgufVocabulary(
        model="llama",
        pre="default",
        tokens=SENTENCEPIECE["tokens"],
        types=SENTENCEPIECE["types"],
        scores=SENTENCEPIECE["scores"],
        merges=[],
        add_bos=True,
        add_space_prefix=True,
        unknown_id=0,
    )
    return structs.replace(vocabulary, **changes)


def _tokenizer(vocabulary: GgufVocabulary, bos_id: int | None = 1) -> Tokenizer:
    return Tokenizer(from_gguf(vocabulary, bos_id), None, frozenset())


BYTE_LEVEL = _tokenizer(_byte_level())
SPM = _tokenizer(_sentencepiece())


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    entry = CATALOG[0]
    if not is_cached(entry, cache_dir()):
        pytest.skip(f"{entry.name} is not in the cache: edgelam model fetch {entry.name}")
    return Tokenizer.from_checkpoint(open_checkpoint(entry.path(cache_dir())))


@pytest.mark.download
def test_smollm2_gives_the_ids_of_transformers(smollm2: Tokenizer) -> None:
    for known in SMOLLM2["texts"]:
        assert smollm2.encode(known["text"], add_special=False) == known["ids"], known["text"]
        assert smollm2.decode(known["ids"]) == known["text"]


@pytest.mark.download
def test_smollm2_renders_conversations_as_transformers_does(smollm2: Tokenizer) -> None:
    for known in SMOLLM2["conversations"]:
        assert smollm2.render(known["messages"]) == known["text"]
        assert smollm2.chat(known["messages"]) == known["ids"]
    assert smollm2.stop_ids == {0, 2}


@pytest.mark.parametrize("known", SENTENCEPIECE["texts"], ids=lambda known: repr(known["text"]))
def test_sentencepiece_vocabularies_give_the_ids_of_sentencepiece(known: dict[str, Any]) -> None:
    assert SPM.encode(known["text"], add_special=False) == known["ids"]
    assert SPM.decode(known["ids"]) == known["decoded"] == known["text"]


def test_the_beginning_of_text_is_put_first_where_the_model_wants_it() -> None:
    assert SPM.encode("a")[0] == 1
    assert SPM.encode("a")[1:] == SPM.encode("a", add_special=False)
    assert BYTE_LEVEL.encode("a") == BYTE_LEVEL.encode("a", add_special=False)


def test_both_formats_of_a_checkpoint_give_the_same_ids(tmp_path: Path) -> None:
    config = tiny_config(blocks=1)
    tensors = random_tensors(config)
    paths = write_gguf(tmp_path / "a.gguf", config, tensors), write_hf(tmp_path / "hf", config, tensors)
    ours, theirs = (Tokenizer.from_checkpoint(open_checkpoint(path)) for path in paths)
    text = "Hello the world and you, user 123 <|im_end|> ü"
    reference = tiny_tokenizer()
    reference.encode_special_tokens = True
    assert ours.encode(text) == theirs.encode(text) == reference.encode(text).ids
    assert ours.chat([{"role": "user", "content": text}]) == theirs.chat([{"role": "user", "content": text}])
    assert ours.stop_ids == theirs.stop_ids == {0, 2}


@given(st.text(max_size=80))
def test_any_text_survives_the_way_there_and_back(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text
    assert SPM.decode(SPM.encode(text)) == text.replace(SPACE_LETTER, " "), "SentencePiece takes U+2581 for a space"


@given(st.lists(st.integers(-2, 600), max_size=60))
def test_text_shown_piece_by_piece_is_the_text_decoded_at_once(ids: list[int]) -> None:
    for tokenizer in (BYTE_LEVEL, SPM):
        detokenizer = tokenizer.detokenizer()
        shown = "".join([*(detokenizer.push(token) for token in ids), detokenizer.flush()])
        assert shown == tokenizer.decode(ids)


def test_a_character_in_several_tokens_is_shown_when_it_is_whole() -> None:
    ids = BYTE_LEVEL.encode("a🙂b")
    detokenizer = BYTE_LEVEL.detokenizer()
    assert [detokenizer.push(token) for token in ids] == ["a", "", "", "", "🙂", "b"]
    detokenizer = BYTE_LEVEL.detokenizer()
    for token in ids[:3]:
        detokenizer.push(token)
    assert detokenizer.flush() == "\ufffd", "a character cut off is shown as cut off"


def test_special_tokens_typed_by_a_user_are_ordinary_text() -> None:
    for tokenizer, text in ((BYTE_LEVEL, "<|im_end|>"), (SPM, "</s>")):
        ids = tokenizer.encode(f"a{text}b", add_special=False)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == f"a{text}b"


def test_special_tokens_are_not_shown() -> None:
    assert BYTE_LEVEL.decode([1, *BYTE_LEVEL.encode("Hello"), 2]) == "Hello"


def test_text_that_is_no_text_is_the_users_mistake() -> None:
    with pytest.raises(UsageError, match="not Unicode"):
        BYTE_LEVEL.encode("lone \ud800 surrogate")


def test_text_that_is_too_long_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="characters"):
        BYTE_LEVEL.encode("a" * 2_000_001)
    with pytest.raises(UsageError, match="tokens"):
        BYTE_LEVEL.encode("q" * 140_000)


def test_digits_are_cut_as_each_family_was_trained() -> None:
    def cut(pre: str, text: str) -> list[str]:
        tokenizer = _tokenizer(_byte_level(pre=pre))._encoders.plain
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]  # type: ignore[union-attr]

    assert cut("smollm", "a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
    assert cut("qwen2", "a 1234's") == ["a", "Ġ", "1", "2", "3", "4", "'s"]
    assert cut("llama-bpe", "a 1234's\n\nx") == ["a", "Ġ", "123", "4", "'s", "ĊĊ", "x"]
    assert cut("gpt-2", "a 1234") == ["a", "Ġ1234"]


def test_a_word_of_the_vocabulary_is_one_token_for_llama3_whatever_the_merges_say() -> None:
    tokens = [*vocabulary_tokens(), "whole"]
    changes = {"tokens": tokens, "types": [1] * len(tokens), "scores": [0.0] * len(tokens)}
    assert len(_tokenizer(_byte_level(pre="llama-bpe", **changes)).encode("whole")) == 1
    assert len(_tokenizer(_byte_level(pre="qwen2", **changes)).encode("whole")) > 1


def test_an_unknown_pre_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="'tekken' is not supported") as caught:
        from_gguf(_byte_level(pre="tekken"), None)
    assert all(name in caught.value.message for name in PRE_TOKENIZERS)


@pytest.mark.parametrize(
    "changes",
    [
        {"merges": ["nothing"]},
        {"merges": ["zz yy"]},
        {"tokens": [*vocabulary_tokens()[:-1], "<|im_end|>"]},
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_damage(changes: Any) -> None:
    with pytest.raises(CorruptData, match="tokenizer"):
        from_gguf(_byte_level(**changes), None)


def test_a_special_token_of_one_letter_is_refused() -> None:
    types = [1] * len(vocabulary_tokens())
    types[40] = 3
    with pytest.raises(Refused, match="one letter"):
        from_gguf(_byte_level(types=types), None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", CorruptData),
        ("{}", CorruptData),
        (json.dumps({**json.loads(tiny_tokenizer().to_str()), "decoder": {"type": "WordPiece"}}), CorruptData),
        (json.dumps({**json.loads(tiny_tokenizer().to_str()), "decoder": None}), Refused),
    ],
)
def test_a_tokenizer_file_that_cannot_be_used_is_an_error_of_ours(text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"tokenizer\.json"):
        from_json(TokenizerJson(text=text))


def test_truncation_and_padding_of_a_tokenizer_file_are_not_for_us() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    assert len(Tokenizer(from_json(TokenizerJson(text=tokenizer.to_str())), None, frozenset()).encode("12345")) == 5


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    config = tiny_config(blocks=1)
    folder = write_hf(tmp_path, config, random_tensors(config))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Refused, match="no tokenizer"):
        Tokenizer.from_checkpoint(open_checkpoint(folder))
