"""Text -> token ids -> text, with the checkpoint's own tokenizer.

Special tokens (<|im_start|> and its like) structure a conversation. Those that the chat template writes are special;
the same letters typed by a user are ordinary text, are encoded as ordinary text, and can't end a message or begin
another role. Tokens that the checkpoint lists as added but not special (Qwen3's <think>) are vocabulary: typing them
gives them.

Ids become bytes one by one through a table, and bytes become text at the end, so that what is shown token by token is
what decoding all at once gives.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Final

import tokenizers

from models.chat import MAX_RENDERED_CHARS, ChatTemplate, Message, check_messages
from models.formats.contents import Checkpoint, TokenizerJson
from models.vocabulary import Encoders, from_gguf, from_json
from wire.errors import Refused, UsageError
from wire.limits import MAX_PROMPT_TOKENS

NONCHARACTERS: Final = tuple(chr(0xFDD0 + offset) for offset in range(32))
"""Code points that Unicode keeps free for use inside programs; one that the conversation lacks marks typed specials."""


class Detokenizer:
    """Ids in, text out as soon as it is safe to show. Pushed and flushed texts together equal `Tokenizer.decode`."""

    def __init__(self, pieces: Sequence[bytes], strip_first_space: bool) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip_first_space

    def push(self, token: int) -> str:
        """Give the text that `token` completes; often empty in the middle of a character."""
        piece = self._pieces[token] if 0 <= token < len(self._pieces) else b""
        return self._shown(self._utf8.decode(piece))

    def flush(self) -> str:
        """Give what is left: a replacement character for a character cut off in its middle."""
        return self._shown(self._utf8.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class Tokenizer:
    """A checkpoint's tokenizer, stop tokens and chat template. Safe to share between threads."""

    def __init__(self, encoders: Encoders, template: ChatTemplate | None, stop_ids: frozenset[int]) -> None:
        self.stop_ids = stop_ids
        self._encoders = encoders
        self._template = template
        specials = sorted(encoders.specials, key=len, reverse=True)
        alternatives = "|".join(re.escape(text) for text in specials)
        self._special = re.compile(f"({alternatives})") if specials else None
        self._special_start = re.compile(f"(?=(?:{alternatives}))(.)", re.DOTALL) if specials else None
        self._beginnings = {text[:length] for text in specials for length in range(1, len(text))}

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Build; raise Refused if the checkpoint has no tokenizer or one that is not supported."""
        data = checkpoint.tokenizer_data
        if data is None:
            raise Refused(
                f"{checkpoint.path}: no tokenizer",
                try_="a .gguf with its vocabulary, or tokenizer.json beside config.json",
            )
        encoders = from_json(data) if isinstance(data, TokenizerJson) else from_gguf(data, checkpoint.bos_id)
        source = checkpoint.chat_template
        template = None
        if source is not None:
            bos, eos = (encoders.text_of(number) for number in (checkpoint.bos_id, checkpoint.eos_id))
            template = ChatTemplate(source, bos, eos)
        return cls(encoders, template, checkpoint.stop_ids)

    def to_json(self) -> str:
        """tokenizer.json of what reads a user's text."""
        text: str = self._encoders.plain.to_str()
        return text

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Give the ids of a user's text. `add_special` puts the beginning-of-text token first, if the model has that.

        Raises UsageError for text that is too long or no Unicode.
        """
        return self._encode(self._encoders.plain, text, add_special)

    def decode(self, ids: Iterable[int]) -> str:
        """Give the text of ids, without special tokens. Broken UTF-8 and unknown ids don't raise."""
        detokenizer = self.detokenizer()
        return "".join([*(detokenizer.push(token) for token in ids), detokenizer.flush()])

    def detokenizer(self) -> Detokenizer:
        """Give a fresh one, for one answer."""
        return Detokenizer(self._encoders.pieces, self._encoders.strip_first_space)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Give a conversation as the template writes it. Raises Refused if there is no template; see ChatTemplate."""
        if self._template is None:
            raise Refused("this model has no chat template", try_="edgelam run --raw, which sends the prompt as it is")
        return self._template.render(messages, add_generation_prompt)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Give the ids of a conversation. Only the template's special tokens are special."""
        check_messages(messages)
        mark = next((mark for mark in NONCHARACTERS if not any(mark in m["content"] for m in messages)), None)
        if mark is None:
            raise UsageError("a conversation with all 32 noncharacters U+FDD0 to U+FDEF")
        marked = [{**message, "content": self._marked(message["content"], mark)} for message in messages]
        text = self.render(marked, add_generation_prompt)
        if mark not in text or self._special is None:
            return self._encode(self._encoders.trusted, text, add_special=False)
        ids: list[int] = []
        for number, part in enumerate(self._special.split(text)):
            if number % 2:
                ids.append(self._encoders.specials[part])
            else:
                ids += self._encode(self._encoders.plain, part.replace(mark, ""), add_special=False)
        return ids

    def _marked(self, content: str, mark: str) -> str:
        """Put `mark` inside every special token that a user typed, and after the beginning of one at the end, which
        the template's next letters could complete."""
        if self._special_start is None:
            return content
        broken = self._special_start.sub(rf"\1{mark}", content)
        longest = max(map(len, self._beginnings), default=0)
        open_end = any(broken[-length:] in self._beginnings for length in range(1, longest + 1))
        return broken + mark if open_end else broken

    @staticmethod
    def _encode(encoder: tokenizers.Tokenizer, text: str, add_special: bool) -> list[int]:
        if len(text) > MAX_RENDERED_CHARS:
            raise UsageError(f"a text of {len(text)} characters: at most {MAX_RENDERED_CHARS} are taken")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"not Unicode text: {error.reason} at character {error.start}") from error
        ids: list[int] = encoder.encode(text, add_special_tokens=add_special).ids
        if len(ids) > MAX_PROMPT_TOKENS:
            raise UsageError(f"a text of {len(ids)} tokens: at most {MAX_PROMPT_TOKENS} are taken")
        return ids
