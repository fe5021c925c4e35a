"""An encoder with a job's adapter: made when it is asked for; what was made of an earlier one goes when nothing uses
it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from coordinator.adapters import AdapterShelf
from coordinator.items.labels import Labels
from coordinator.shelf import ItemSource, Shelf
from models.formats.bert import read_bert_config
from models.items.pack import pack_items
from models.items.words import WordTokenizer
from tests.lora.test_merged import JOB, LABELS, Trained
from wire.errors import Refused, UsageError
from wire.samples import Images


class Site:
    """A coordinator that prepares one encoder, and remembers what was removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs = folder / "jobs"
        self.trained = self.train("one", 3)
        self.records_: list[Any] = []
        self.removed: list[str] = []
        self.shelf = Shelf(self.trained.cache)
        self.preparing = self
        adapters = AdapterShelf(self.jobs, self.trained.cache)
        self.labels = Labels(self, self, adapters, self.shelf)  # type: ignore[arg-type]

    def train(self, name: str, seed: int) -> Trained:
        """What a job called `told` leaves."""
        made = Trained(self.folder / name, msgspec.structs.replace(JOB, seed=seed), seed)
        shutil.copytree(made.adapter, self.jobs / "told", dirs_exist_ok=True)
        return made

    def records(self) -> list[Any]:
        return self.records_

    async def prepare(self, model: str, _precision: str, _say: Any) -> Any:
        source = self.trained.source
        words = WordTokenizer.beside(source)
        checkpoint = None if model == "words" else ItemSource(source, words, self.trained.digest)
        return SimpleNamespace(name=model, checkpoint=checkpoint, packed=None)

    async def remove(self, name: str) -> None:
        self.removed.append(name)
        self.records_ = [record for record in self.records_ if record.name != name]

    def model(self, model: str = "tiny", adapter: str = "told") -> Path:
        async def ask() -> Path:
            async with self.asked(model, adapter) as found:
                return Path(found)

        return asyncio.run(ask())

    def asked(self, model: str = "tiny", adapter: str = "told") -> Any:
        return self.labels.model_with(model, adapter, lambda _: None)

    def deploy(self, name: str, folder: Path) -> None:
        self.records_.append(SimpleNamespace(name=name, request=SimpleNamespace(model=str(folder))))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_job_and_a_copy_of_its_adapter_are_the_same_model(site: Site) -> None:
    folder = site.model()
    assert read_bert_config(folder).edgelam_labels == LABELS
    assert site.model(adapter=str(site.trained.adapter)) == folder


def test_what_was_made_of_an_earlier_adapter_goes_when_nothing_uses_it(site: Site) -> None:
    async def two_at_once() -> tuple[Path, Path]:
        async with site.asked() as first:
            site.deploy("first", Path(first))
            site.deploy("other", site.folder / "elsewhere")
            site.train("two", 4)
            async with site.asked() as second:
                site.deploy("second", Path(second))
            assert Path(first).exists() and not site.removed, "an answer is on its way"
            return Path(first), Path(second)

    first, second = asyncio.run(two_at_once())
    assert second != first and site.model() == second
    assert site.removed == ["first"] and not first.exists() and second.exists()


def test_a_task_module_on_features_makes_a_net_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from tests.models.test_pictured import Trained as OfPictures

    site = Site(tmp_path)
    of_pictures = OfPictures(tmp_path, "vit", Images(features="pooled"))
    packed = pack_items(of_pictures.source, "vit", site.trained.cache)

    async def prepare(model: str, _precision: str, _say: Any) -> Any:
        return SimpleNamespace(name=model, checkpoint=ItemSource(of_pictures.source, None), packed=packed)

    site.prepare = prepare  # type: ignore[method-assign]
    shutil.copytree(of_pictures.adapter, site.jobs / "photos")
    first = site.model("vit", "photos")
    assert pack_items(first, "vit-p", site.trained.cache).config.labels == of_pictures.job.labels
    site.deploy("of-first", first)
    of_pictures.write(seed=2)
    shutil.copytree(of_pictures.adapter, site.jobs / "photos", dirs_exist_ok=True)
    second = site.model("vit", "photos")
    assert second != first and not first.exists() and site.removed == ["of-first"]
    with pytest.raises(Refused, match="no sentence encoder"):
        site.model("vit", "told")


def test_what_can_not_be_is_refused(site: Site) -> None:
    with pytest.raises(UsageError, match="no adapter 'nobody'"):
        site.model(adapter="nobody")
    with pytest.raises(Refused, match="no sentence encoder"):
        site.model("words")
