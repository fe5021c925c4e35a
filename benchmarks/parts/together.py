"""Models that boards train together, beside the same steps in one place: the blocks on one board, on several, or one
block for all depths shared among several; over MQTT, with SmolLM2 on real text and MiniLM on real labels.

Each round is a step, so that the loss of each is told. A gradient is shortened to the epsilon of AdamW, whose first
step then goes along it, about as far as the learning rate says. (At a usual length it goes by the signs of gradients,
and last digits turn those of what is next to nothing.) So what two or three steps change is the sum of their gradients,
but for the length of each, and is to be that of one place in each kind of factors: the first step moves B, or a task
module, the second weights and A, or B, and a third A. And so is each loss of twenty steps.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch

from agent.workers.roundwork import device_seed
from benchmarks.parts import sections
from benchmarks.parts.jobs import events_of
from benchmarks.parts.peaks import peak_of
from benchmarks.parts.sites import MODEL, Site, packed_model, whole_site
from benchmarks.report import Figure, at_most
from coordinator.client import Client
from coordinator.rounds.adapters import parts_of, spec_of
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.orders import task_of
from models.cache import cache_dir
from models.catalog import resolve
from models.families.bert import BertConfig
from models.formats import safetensors
from models.formats.bert import BertFile, read_bert_config
from models.formats.checkpoint import open_checkpoint
from models.lora.adapter import HEAD, HEAD_FILE, Config, Floats, flat, from_peft, initial, named, shapes
from models.lora.serving import TENSORS
from models.lora.whole import tensors_of, weights_of
from models.text import Tokenizer
from models.training.data import read
from models.training.samples import Split, encoder_of, labelled_rows, rows_of, split
from testbed.boards import preset, with_data
from tests.training.looped_models import OneBlock
from tests.training.split_models import InOnePlace, bert, llama
from wire.messages import ArtifactRef

STEPS: Final = 20
FEW_STEP: Final = 1.0
"""How far each step goes where changes are compared: of a small change of a large number float32 holds few digits."""
BOARDS: Final = 3
NEAR: Final = 1e-5
EPSILON: Final = 1e-8
"""Of torch's AdamW."""
TEXT: Final = Path(__file__).parents[1] / "texts" / "python_reference.txt"


_PARTS: Final = {"a": "A", "b": "B", "w": "weights", "c": "the task module"}


class Case(NamedTuple):
    """What is trained, and in which modes."""

    name: str
    model: str
    modes: tuple[str, ...]
    step: float
    """How far a step goes."""
    few: int
    """Steps after which changes are compared: when all kinds of factors have moved, and no later, since training itself
    makes differences larger."""
    blocks: bool = False


CASES: Final = (
    Case("smollm2", MODEL, ("split", "pipeline"), 0.1, 2),
    Case("minilm", sections.MODEL, ("split", "pipeline"), 0.3, 3),
    Case("minilm, all weights", sections.MODEL, ("split", "pipeline"), 0.3, 2, True),
    Case("minilm, all weights", sections.MODEL, ("looped",), 0.06, 2, True),
)


DEPTHS: Final = (("shard", 3), ("shard", 12), ("hub", 3), ("hub", 12))


class Learnt(NamedTuple):
    """In one place."""

    losses: list[float]
    config: Config
    start: Floats
    vector: Floats


def measure() -> list[Figure]:
    torch.set_num_threads(1)  # as boards do
    figures = []
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
            figures += _measured(case, Path(folder))
    return [*figures, *_deep()]


def _deep() -> list[Figure]:
    """What processes take that have a part of one block for all depths."""
    deep = {(part, depth): peak_of(f"encoder 16 128 8 blocks keep {part} {depth}") for part, depth in DEPTHS}
    shard = deep["shard", 12].measured / deep["shard", 3].measured
    hub = deep["hub", 12].measured / deep["hub", 3].measured
    return [
        at_most("memory of a shard at depth 12 / at depth 3", shard, "ratio", 1.05),
        Figure("memory of a hub at depth 12 / at depth 3", hub, "ratio"),
    ]


def _measured(case: Case, folder: Path) -> list[Figure]:
    figures, data = [], folder / "data"
    data.mkdir()
    boards = preset("equal", BOARDS)
    names = [board.name for board in boards]
    with_rows = names[:2]
    job = _job_of(case, _write(case.model, data, with_rows))
    alone = _changed(job, case.modes[0], ())
    few_rounds = _rounds_of(FEW_STEP, case.few)
    expected = _in_one_place(alone, data, with_rows, folder)
    after_few = _in_one_place(msgspec.structs.replace(alone, rounds=few_rounds), data, with_rows, folder)
    with whole_site("f32", with_data(boards, "rows", data), case.model) as site:
        for mode in case.modes:
            wanted = _changed(job, mode, tuple(names[2:] if mode == "split" else names[1:]))
            few = msgspec.structs.replace(wanted, name=f"{wanted.name}-few", rounds=few_rounds)
            events_of(site.there, few)
            found = [event["loss"] for event in events_of(site.there, wanted) if event["trained"]]
            off = max(abs(one / other - 1) for one, other in zip(found, expected.losses, strict=True))
            name = f"{case.name}, {mode}"
            figures += [
                at_most(f"{name}, gradients of {part}: off by", off_by, "ratio", NEAR)
                for part, off_by in _apart(site, few, after_few).items()
            ]
            figures += [
                Figure(f"{name}, {STEPS} steps: loss of the first", found[0], "nats"),
                Figure(f"{name}, {STEPS} steps: loss of the last", found[-1], "nats"),
                at_most(f"{name}, {STEPS} steps: farthest from one place", off, "ratio", NEAR),
            ]
    return figures


def _job_of(case: Case, labels: tuple[str, ...]) -> Job:
    train: Any = "blocks" if case.blocks else "factors"
    adapter = Adapter() if case.blocks else Adapter(rank=4, matrices=("q", "v", "down"))
    return Job(
        name="bench", model=case.model, data="rows", precision="f32", labels=labels, train=train, adapter=adapter,
        rounds=_rounds_of(case.step, STEPS),
    )  # fmt: skip


def _rounds_of(step: float, count: int) -> Rounds:
    return Rounds(
        count=count, steps=1, batch_rows=2, row_tokens=48, held_out=0.1, learning_rate=step, most_norm=EPSILON
    )


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


def _in_one_place(job: Job, data: Path, names: list[str], folder: Path) -> Learnt:
    """What comes of all steps with all rows here."""
    spec = spec_of(job)
    source = resolve(job.model, cache_dir())
    halves: Any
    if job.labels:
        checkpoint = source if source.is_dir() else source.parent
        config: Any = read_bert_config(checkpoint)
        tokenizer, end_id = (checkpoint / "tokenizer.json").read_text(encoding="utf-8"), None
        begun = initial(config, spec)
        if spec.blocks:
            begun.update(weights_of(BertFile.open(config, checkpoint / "model.safetensors")))
        begun = {name: begun[name] for name in shapes(config, spec)}
        halves = bert(checkpoint, spec, (), begun)
        if spec.looped:
            halves.whole.factors = OneBlock(halves.whole.factors)
    else:
        assert job.model == MODEL
        packed, opened = packed_model("f32"), open_checkpoint(source, cache_dir())
        config, end_id = packed.config, opened.eos_id
        tokenizer, begun = Tokenizer.from_checkpoint(opened).to_json(), initial(config, spec)
        halves = llama(packed, folder, spec, (), begun)
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
    shaped = shapes(config, spec)
    start = vector = flat(begun, shaped)
    losses = []
    for number in range(job.rounds.count):
        one = InOnePlace(halves, rows, task, vector, parts_of(job, number), seeds, number)
        losses.append(one.step())
        vector = one.vector()
        print(f"... {job.model}, one place: step {number}: {losses[-1]:.4f}", file=sys.stderr)
    return Learnt(losses, config, start, vector)


def _apart(site: Site, job: Job, expected: Learnt) -> dict[str, float]:
    """How far what a job changed is from what one place changed, beside that: of A, B, weights and task module."""
    shaped = shapes(expected.config, spec_of(job))
    start, due = named(expected.start, shaped), named(expected.vector, shaped)
    found = _factors_of(site.there, job, expected.config, site.folder)
    apart = dict[str, float]()
    for part in parts_of(job, 0):
        names = [name for name in shaped if name[-1] == part]
        changed = np.concatenate([(due[name].astype(np.float64) - start[name]).reshape(-1) for name in names])
        off = np.concatenate([(found[name].astype(np.float64) - due[name]).reshape(-1) for name in names])
        apart[_PARTS[part]] = float(np.linalg.norm(off) / np.linalg.norm(changed))
    print(f"... {job.model}, {job.mode}: {apart}", file=sys.stderr)
    return apart


def _factors_of(there: Client, job: Job, config: Config, folder: Path) -> Mapping[str, Floats]:
    """What a job came to, by the names inside."""
    files = {}
    for file in (TENSORS, HEAD_FILE) if job.labels else (TENSORS,):
        (folder / file).write_bytes(there.file(f"/v1/jobs/{job.name}/{file}"))
        files[file] = {name: np.array(values, np.float32) for name, values in safetensors.read(folder / file).items()}
    found = dict[str, Floats]()
    if job.train == "blocks":
        assert isinstance(config, BertConfig)
        for name, tensor in tensors_of(config):
            values = files[TENSORS][tensor.file_name]
            found[name] = values.reshape(-1, values.shape[-1])
    else:
        found.update(from_peft(config, files[TENSORS]))
    if job.labels:
        head = files[HEAD_FILE]
        found[HEAD] = np.concatenate([head["weight"], head["bias"][:, None]], axis=1)
    return found
