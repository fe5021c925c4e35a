"""Make the reference that our tokenizer and engines are tested against: `transformers` in fp32 on the GGUF's weights.

Run by hand, in an environment of its own (it is slow, and nothing else needs these packages):

    pip install torch transformers accelerate gguf
    python tools/reference.py SmolLM2-135M-Instruct.Q4_1.gguf tests/models/golden/smollm2_reference.json

The document holds, for each prompt, the ids, 64 greedy tokens (stop tokens don't stop it), the smallest lead of a
chosen token over the next one, and at a few positions the 8 largest logits and those of fixed ids; then texts with
their ids, and conversations with their rendered text and ids. Position p is the row that has seen p + 1 tokens of
prompt and answer together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers

GREEDY_TOKENS: Final = 64
TOP: Final = 8
FIXED_IDS: Final = (0, 1, 2, 28, 198, 1_000, 10_000, 28_000, 40_000, 49_151)
DIGITS: Final = 6

CHAT_PROMPTS: Final = (
    "What is the capital of France?",
    "Write a short poem about a lighthouse in winter.",
    "Explain in three sentences why the sky is blue.",
)
PLAIN_PROMPTS: Final = (
    "def fibonacci(n):\n",
    "The three states of matter are",
)
TEXTS: Final = (
    "",
    " ",
    "Hello world",
    "  two spaces,\ttab\nand a line\n\n",
    "In 2024, 1234567 people paid 3.14 euros.",
    "Ärger über naïve façades: déjà vu!",
    "漢字とかな、한국어, Ελληνικά, кириллица",
    "🙂👩‍👩‍👧 emoji 🇫🇷",
    "for i in range(10):\n    print(f'{i:>3}')  # loop\n",
    "It's we'll they've I'd — “quotes”…",
    "a\u0000b\u200bc\u00a0d\u0301",
    "https://example.org/a_b?c=d&e=%20f",
)
CONVERSATIONS: Final[tuple[list[dict[str, str]], ...]] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Colour of the sky?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "  Tell me\na joke. "},
    ],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    folder, file = given.gguf.parent, given.gguf.name
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.eval()
    document = {
        "model": "smollm2-135m-instruct",
        "made_by": {"torch": torch.__version__, "transformers": transformers.__version__},
        "file_sha256": hashlib.sha256(given.gguf.read_bytes()).hexdigest(),
        "fixed_ids": FIXED_IDS,
        "prompts": [_answered(model, tokenizer, text, chat=True) for text in CHAT_PROMPTS]
        + [_answered(model, tokenizer, text, chat=False) for text in PLAIN_PROMPTS],
        "texts": [{"text": text, "ids": _ids(tokenizer, text)} for text in TEXTS],
        "conversations": [_rendered(tokenizer, messages) for messages in CONVERSATIONS],
    }
    given.out.write_text(json.dumps(document, indent=1) + "\n")


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, Any]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"messages": messages, "text": text, "ids": _ids(tokenizer, text)}


@torch.inference_mode()
def _answered(model: Any, tokenizer: Any, prompt: str, *, chat: bool) -> dict[str, Any]:
    """Continue one prompt greedily, then run prompt and answer at once for the logits."""
    text = _rendered(tokenizer, [{"role": "user", "content": prompt}])["text"] if chat else prompt
    ids = _ids(tokenizer, text)
    given, cache, tokens, least_lead = torch.tensor([ids]), None, [], float("inf")
    for _ in range(GREEDY_TOKENS):
        out = model(given, past_key_values=cache, use_cache=True)
        best = torch.topk(out.logits[0, -1], 2)
        least_lead = min(least_lead, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        given, cache = torch.tensor([[tokens[-1]]]), out.past_key_values
    rows = model(torch.tensor([ids + tokens])).logits[0]
    positions = (0, len(ids) // 2, len(ids) - 1, len(ids) + 15, len(ids) + GREEDY_TOKENS - 2)
    return {
        "prompt": prompt,
        "chat": chat,
        "ids": ids,
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
        "least_lead": round(least_lead, DIGITS),
        "logits": [_logits(rows[position], position) for position in positions],
    }


def _logits(row: torch.Tensor, position: int) -> dict[str, Any]:
    top = torch.topk(row, TOP)
    return {
        "position": position,
        "top_ids": top.indices.tolist(),
        "top_values": [round(value, DIGITS) for value in top.values.tolist()],
        "fixed_values": [round(float(row[number]), DIGITS) for number in FIXED_IDS],
    }


if __name__ == "__main__":
    main()
