"""A real task: which section of the Debian archive a package belongs to, by its one line of description.

The index that apt keeps on every Debian board has some 60,000 packages. Those of one maintainer stay together, on one
of the boards, so that boards differ as much as teams do: each has sections of its own.

`python -m benchmarks.parts.sections FOLDER` writes a file for each of eight boards, and prints the labels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.parts.jobs import events_of
from benchmarks.parts.sites import Site, whole_site
from benchmarks.report import Figure, at_least
from coordinator.rounds.adapters import spec_of
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.orders import task_of
from models.cache import cache_dir
from models.catalog import resolve
from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import AdapterSpec, flat, initial, shapes
from models.training.data import read
from models.training.samples import Row, Split, batches, encoder_of, labelled_rows, split
from testbed.boards import preset, with_data
from wire.messages import ArtifactRef, InboxAddress, RoundMeta

LEAST_OF_SECTION: Final = 400
"""Packages, for a section to be a label."""
MOST: Final = 8000
"""Packages in all, drawn by chance."""
BOARDS: Final = 8
MODEL: Final = "minilm"
STEPS: Final = 16
"""Of each board in a round."""
RATE: Final = 3e-3
"""What the mean over boards takes back of labels that one of them has is made up for by longer steps."""
ALONE: Final = 8
RATE_ALONE: Final = 1e-3
SPLIT_SHARE: Final = 67
"""Per cent of the rounds, for the job that splits its model."""
SPLIT_STEPS: Final = 32
SPLIT_ROWS: Final = 4
"""Of each board in a step."""


class Package(NamedTuple):
    section: str
    maintainer: str
    description: str


def index() -> Iterator[Package]:
    """What apt knows; raises FileNotFoundError where there is no apt, CalledProcessError where its index is broken."""
    done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True)
    for entry in done.stdout.decode("utf-8", "replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in entry.split("\n") if ": " in line and not line.startswith(" "))
        description = fields.get("Description", fields.get("Description-en", ""))
        if description and {"Section", "Maintainer"} <= fields.keys():
            yield Package(fields["Section"].rsplit("/", 1)[-1], fields["Maintainer"], description)


def drawn(packages: Sequence[Package], most: int = MOST, seed: int = 1) -> list[Package]:
    """Of large sections, each description once."""
    counted = Counter(package.section for package in packages)
    once = {package.description: package for package in packages if counted[package.section] >= LEAST_OF_SECTION}
    kept = [once[description] for description in sorted(once)]
    return [kept[place] for place in np.random.default_rng(seed).permutation(len(kept))[:most]]


def labels_of(packages: Sequence[Package]) -> tuple[str, ...]:
    return tuple(sorted({package.section for package in packages}))


def by_board(packages: Sequence[Package], boards: int = BOARDS) -> list[list[Package]]:
    """All of a maintainer on one board, the largest first and each to the board that has fewest."""
    whose: dict[str, list[Package]] = defaultdict(list)
    for package in packages:
        whose[package.maintainer].append(package)
    shares: list[list[Package]] = [[] for _ in range(boards)]
    for maintainer in sorted(whose, key=lambda name: (-len(whose[name]), name)):
        min(shares, key=len).extend(whose[maintainer])
    return shares


def unlike(shares: Sequence[Sequence[Package]]) -> float:
    """How far boards' labels are from those of all: the mean total variation, 0 to 1."""
    everybody = Counter(package.section for share in shares for package in share)
    total = sum(everybody.values())
    found = []
    for share in shares:
        own = Counter(package.section for package in share)
        found.append(sum(abs(own[name] / len(share) - everybody[name] / total) for name in everybody) / 2)
    return float(np.mean(found))


def write(folder: Path, names: Sequence[str], most: int = MOST) -> tuple[str, ...]:
    """A file of data for each board; gives the labels."""
    packages = drawn(list(index()), most)
    for name, share in zip(names, by_board(packages, len(names)), strict=True):
        lines = (json.dumps({"text": one.description, "label": one.section}) for one in share)
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return labels_of(packages)


def vectors_of(
    count: int = 10, each: int = 600, seed: int = 1
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """MiniLM's mean of each description [n, hidden], scaled to length 4, and the place of its section [n] among so many
    of the largest, `each` of every one of them."""
    import torch

    from models.training.encoder import TrainedEncoder

    packages = drawn(list(index()), 10**9, seed)
    most = sorted(name for name, _ in Counter(package.section for package in packages).most_common(count))
    kept = [one for name in most for one in [two for two in packages if two.section == name][:each]]
    checkpoint = _checkpoint()
    encode = encoder_of((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    file = BertFile.open(read_bert_config(checkpoint), checkpoint / "model.safetensors")
    stage = TrainedEncoder(file, AdapterSpec(rank=1, alpha=1.0), {})
    rows = [Row(np.array(encode(one.description, True)[:32], np.int64), 1, most.index(one.section)) for one in kept]
    found = []
    with torch.no_grad():
        for batch in batches(rows, 64):
            ids, lengths = torch.from_numpy(batch.ids), torch.from_numpy(batch.lengths)
            found.append(stage.means(stage.run(stage.embedded(ids), lengths), lengths).numpy())
    vectors = np.concatenate(found)
    vectors *= 4 / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, np.array([row.label for row in rows], np.int64)


def _checkpoint() -> Path:
    source = resolve(MODEL, cache_dir())
    return source if source.is_dir() else source.parent


def job_of(labels: tuple[str, ...], rounds: int) -> Job:
    return Job(
        name="sections",
        model=MODEL,
        data="packages",
        precision="f32",
        labels=labels,
        adapter=Adapter(rank=8, matrices=("q", "v")),
        rounds=Rounds(count=rounds, steps=STEPS, batch_rows=16, row_tokens=32, learning_rate=RATE, held_out=0.1),
    )


def split_of(job: Job, rounds: int) -> Job:
    """The same over boards that have the ends of the model alone: each step is made with rows of all of them, so that
    the learning rate is that of one place."""
    each = msgspec.structs.replace(
        job.rounds, count=rounds, steps=SPLIT_STEPS, batch_rows=SPLIT_ROWS, learning_rate=RATE_ALONE
    )
    return msgspec.structs.replace(job, name="sections-split", mode="split", rounds=each)


def in_one_place(job: Job, folder: Path, names: Sequence[str]) -> list[float]:
    """The share of held-out labels that is told right, before each round and in the end, by one who has the data of
    all boards, and makes as many steps in a round as they do together. What is held out is the same. It is at
    its best within ALONE rounds, mostly behind two or three."""
    from models.training.encoder import TrainedEncoder
    from models.training.rounds import Round

    checkpoint = _checkpoint()
    config, spec = read_bert_config(checkpoint), spec_of(job)
    shaped, first = shapes(config, spec), initial(config, spec)
    stage = TrainedEncoder(BertFile.open(config, checkpoint / "model.safetensors"), spec, first)
    encode = encoder_of((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    rounds = msgspec.structs.replace(job.rounds, steps=STEPS * len(names), learning_rate=RATE_ALONE)
    alone = msgspec.structs.replace(job, rounds=rounds)
    task = task_of(alone, ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), None)
    splits = []
    for name in names:
        rows = labelled_rows(read(folder / f"{name}.jsonl").samples, encode, task.row_tokens, task.labels)
        splits.append(split(rows, task.held_out, task.seed))
    whole = Split(
        tuple(row for one in splits for row in one.trained), tuple(row for one in splits for row in one.held_out)
    )
    factors, found = flat(first, shaped), []
    for number in range(ALONE + 1):
        train = number < ALONE
        asked = RoundMeta(reply=InboxAddress(topic="t"), round=number, parts=("a", "b", "c"), train=train)
        made = Round(stage, shaped, whole, task, 1, asked, factors)
        while made.step():
            pass
        found.append((made.held_out_right or 0) / made.held_out_count)
        print(f"... in one place, round {number}: {found[-1]:.1%} right", file=sys.stderr)
        factors = made.vector()
    return found


class Ran(NamedTuple):
    """What became of a job."""

    before: float
    right: float
    sent_bytes: float
    """By each board in a round."""
    round_s: float
    took_s: float


def ran(site: Site, job: Job, names: Sequence[str]) -> Ran:
    began_s = time.monotonic()
    found = events_of(site.there, job)
    took_s = time.monotonic() - began_s
    trained = found[:-1]
    # One board of a split job has the blocks, too, and sends what they make: that is not its data's share.
    each = [one["up_bytes"] / len(names) for one in trained]
    walls = [one["wall_s"] for one in trained[1:]] or [trained[0]["wall_s"]]
    first, last = found[0]["held_out_accuracy"], found[-1]["held_out_accuracy"]
    return Ran(first, last, float(np.mean(each)), median(walls), took_s)


def measure(rounds: int) -> list[Figure]:
    boards = preset("equal", BOARDS)
    names = [board.name for board in boards]
    split_rounds = max(1, rounds * SPLIT_SHARE // 100)
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as folder:
        job = job_of(write(Path(folder), names), rounds)
        with whole_site("f32", with_data(boards, "packages", Path(folder)), MODEL) as site:
            done = {
                f"federated, {rounds} rounds": (ran(site, job, names), rounds),
                f"split, {split_rounds} rounds": (ran(site, split_of(job, split_rounds), names), split_rounds),
            }
        alone = max(in_one_place(job, Path(folder), names))
    figures = [
        Figure("labels", len(job.labels), ""),
        Figure("boards' labels differ from those of all by", unlike(by_board(drawn(list(index())))), "of 1"),
        Figure("right in one place, at its best", alone, "of labels"),
    ]
    for what, (one, count) in done.items():
        figures += [
            Figure(f"{what}: right before", one.before, "of labels"),
            Figure(f"{what}: right", one.right, "of labels"),
            at_least(f"{what}: boards / one place", one.right / alone, "ratio", 0.97),
            Figure(f"{what}: sent by each board in a round", one.sent_bytes / 1e6, "MB"),
            Figure(f"{what}: sent by each board in all", one.sent_bytes * count / 1e6, "MB"),
            Figure(f"{what}: a round", one.round_s, "s"),
            Figure(f"{what}: all of it", one.took_s, "s"),
        ]
    return figures


if __name__ == "__main__":
    told = write(Path(sys.argv[1]), [f"board{number}" for number in range(1, BOARDS + 1)])
    print(json.dumps(told))
