"""Models that boards train together, the blocks on one of them or on several, beside the same steps in one place: over
MQTT, with SmolLM2 on real text and MiniLM on real labels. Each round is a step, so that the loss of each is told; and
each step is the first of AdamW, which goes by the signs of gradients: last digits turn those of gradients that are next
to nothing."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.workers.roundwork import device_seed
from benchmarks.parts import sections
from benchmarks.parts.jobs import events_of
from benchmarks.parts.sites import MODEL, packed_model, whole_site
from benchmarks.report import Figure, at_most
from coordinator.rounds.adapters import parts_of, spec_of
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.orders import task_of
from models.cache import cache_dir
from models.catalog import resolve
from models.formats.bert import read_bert_config
from models.formats.checkpoint import open_checkpoint
from models.lora.adapter import flat, initial, shapes
from models.text import Tokenizer
from models.training.data import read
from models.training.samples import Split, encoder_of, labelled_rows, rows_of, split
from testbed.boards import preset, with_data
from tests.training.split_models import InOnePlace, bert, llama
from wire.messages import ArtifactRef

STEPS: Final = 20
BOARDS: Final = 3
TEXT: Final = Path(__file__).parents[1] / "texts" / "python_reference.txt"
ROUNDS: Final = Rounds(count=STEPS, steps=1, batch_rows=2, row_tokens=48, held_out=0.1, learning_rate=2e-4)


def measure() -> list[Figure]:
    return [*_measured("smollm2"), *_measured("minilm")]


def _measured(model: str) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        boards = preset("equal", BOARDS)
        names = [board.name for board in boards]
        with_rows = names[:2]
        labels = _write(model, data, with_rows)
        job = Job(
            name="bench", model=model, data="rows", precision="f32", labels=labels, rounds=ROUNDS,
            adapter=Adapter(rank=4, matrices=("q", "v", "down")),
        )  # fmt: skip
        expected = _in_one_place(job, data, with_rows, Path(folder))
        with whole_site("f32", with_data(boards, "rows", data), model) as site:
            for mode, trunk in (("split", names[2:]), ("pipeline", names[1:])):
                wanted = _changed(job, mode, tuple(trunk))
                found = [event["loss"] for event in events_of(site.there, wanted) if event["trained"]]
                off = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
                name = f"{model}, {mode}, {STEPS} steps"
                figures += [
                    Figure(f"{name}: loss of the first", found[0], "nats"),
                    Figure(f"{name}: loss of the last", found[-1], "nats"),
                    at_most(f"{name}: farthest from one place", off, "ratio", 5e-4),
                ]
    return figures


def _changed(job: Job, mode: str, trunk: tuple[str, ...]) -> Job:
    return msgspec.structs.replace(job, name=f"bench-{mode}", mode=mode, trunk=trunk)


def _write(model: str, data: Path, names: list[str]) -> tuple[str, ...]:
    """Rows for each board; gives the labels, if there are some."""
    if model == sections.MODEL:
        return sections.write(data, names, 400)
    paragraphs = [part for part in TEXT.read_text(encoding="utf-8").split("\n\n") if len(part) > 80][:80]
    for number, name in enumerate(names):
        (data / f"{name}.txt").write_text("\n\n".join(paragraphs[number :: len(names)]), encoding="utf-8")
    return ()


def _in_one_place(job: Job, data: Path, names: list[str], folder: Path) -> list[float]:
    """The loss of each step, with all rows here."""
    spec = spec_of(job)
    source = resolve(job.model, cache_dir())
    halves: Any
    if job.labels:
        checkpoint = source if source.is_dir() else source.parent
        config: Any = read_bert_config(checkpoint)
        tokenizer, end_id = (checkpoint / "tokenizer.json").read_text(encoding="utf-8"), None
        halves = bert(checkpoint, spec, (), initial(config, spec))
    else:
        assert job.model == MODEL
        packed, opened = packed_model("f32"), open_checkpoint(source, cache_dir())
        config, end_id = packed.config, opened.eos_id
        tokenizer = Tokenizer.from_checkpoint(opened).to_json()
        halves = llama(packed, folder, spec, (), initial(config, spec))
    task = task_of(job, ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), end_id)
    encode, rows = encoder_of(tokenizer), dict[str, Split]()
    for name in names:
        samples = read(next(data.glob(f"{name}.*"))).samples
        if job.labels:
            found = labelled_rows(samples, encode, task.row_tokens, job.labels)
        else:
            found = rows_of(samples, encode, task.row_tokens, end_id)
        rows[name] = split(found, task.held_out, task.seed)
    seeds = {name: device_seed(task.seed, name) for name in names}
    vector, losses = flat(initial(config, spec), shapes(config, spec)), []
    for number in range(STEPS):
        one = InOnePlace(halves, rows, task, vector, parts_of(job, number), seeds, number)
        losses.append(one.step())
        vector = one.vector()
        print(f"... {job.model}, one place: step {number}: {losses[-1]:.4f}", file=sys.stderr)
    return losses
