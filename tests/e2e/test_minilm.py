"""The real sentence encoder on a real site: its vectors are those of the formulas, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from models.cache import cache_dir
from models.catalog import find
from models.formats import safetensors
from models.items.words import WordTokenizer
from tests.e2e.site import Site, catalog_site
from tests.models.tiny_bert import vector_of

pytestmark = [pytest.mark.download, pytest.mark.slow, pytest.mark.timeout(240)]

TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Boards find each other over mDNS, and exchange activations over MQTT.",
]


@pytest.fixture(scope="module")
def three_boards() -> Iterator[Site]:
    with catalog_site("minilm", 3) as running:
        yield running


def test_cuts_over_one_two_and_three_boards_give_the_same_vectors(three_boards: Site) -> None:
    entry = find("minilm")
    assert entry is not None
    path = entry.path(cache_dir())
    words, weights = WordTokenizer.beside(path), safetensors.read(path)
    assert words is not None
    found: list[Any] = []
    with openai.OpenAI(base_url=f"{three_boards.address['http_url']}/v1", api_key="any", timeout=200) as client:
        for boards in (3, 2, 1):
            spread = {"edgelam": {"boards_at_least": boards, "boards_at_most": boards}}
            made = client.embeddings.create(model="minilm", input=TEXTS, extra_body=spread)
            found.append([row.embedding for row in made.data])
    assert found[0] == found[1] == found[2]
    for text, vector in zip(TEXTS, found[0], strict=True):
        np.testing.assert_allclose(vector, vector_of(words.encode(text), weights, 12), atol=2e-6)
    alike = np.array(found[0]) @ np.array(found[0]).T
    assert alike[0, 1] > 0.7 and alike[0, 2] < 0.2 and alike[0, 3] < 0.2
