"""Features of a published net, from the tensor that the catalog names. Needs no Pillow, so it stands by itself."""

from __future__ import annotations

import pytest

from models.cache import cache_dir
from models.catalog import find, is_cached
from models.items.features import features_part
from models.items.pack import pack_items


@pytest.mark.slow
@pytest.mark.download
def test_the_catalog_names_features_of_the_published_net() -> None:
    entry = find("vit")
    assert entry is not None
    if not is_cached(entry, cache_dir()):
        pytest.skip("edgelam model fetch vit")
    whole = pack_items(entry.path(cache_dir()), "vit", cache_dir())
    part = features_part(whole, entry.features)
    assert part.hidden == 384 and len(part.files) > 10
