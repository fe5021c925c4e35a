"""A hub, its shards, and boards with data: what they say to each other, who is named, and when it is lost."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from agent.orders import problem_with  # noqa: E402
from agent.workers.endswork import EndsWork  # noqa: E402
from agent.workers.hubwork import HubWork  # noqa: E402
from agent.workers.roundwork import device_seed  # noqa: E402
from agent.workers.shardwork import ShardWork  # noqa: E402
from agent.workers.splitwork import SplitWork  # noqa: E402
from agent.workers.stretch import Stretch  # noqa: E402
from models.lora.adapter import AdapterSpec, Floats, named  # noqa: E402
from models.training.samples import Split  # noqa: E402
from tests.agent.fakes import DEVICE, desired_of, order_of  # noqa: E402
from tests.agent.fakes import SITE as FAKE_SITE  # noqa: E402
from tests.agent.test_splitwork import ENDS, REPLY, SITE, Part  # noqa: E402
from tests.agent.training_fakes import Delivery, Sender  # noqa: E402
from tests.models.tiny_bert import write_bert  # noqa: E402
from tests.training.looped_models import PARTS, Looped, shares_of  # noqa: E402
from tests.training.split_models import InOnePlace, rows_of, task_of  # noqa: E402
from wire.frames import Kind, Parcel, Tensor  # noqa: E402
from wire.messages import (  # noqa: E402
    InboxAddress,
    Peer,
    RoundMeta,
    SplitMeta,
    SplitRound,
    StageError,
    StageOrder,
    UpdateMeta,
)
from wire.shares import Share, Turn  # noqa: E402

pytestmark = pytest.mark.torch

STEPS = 3
SHARDS = ("s", "a", "u")
"""The second is a board with data, too."""
WORKS = ("h", "s1", "s2", "s3", *ENDS)


def inbox(work: str) -> str:
    return f"edgelam/v1/{SITE}/act/tune-n/{WORKS.index(work)}/in"


def peer_of(work: str, device: str = "") -> Peer:
    return Peer(device=device or work, inbox=InboxAddress(topic=inbox(work)))


class Bench:
    """A hub, three shards and two boards with data, and what is on its way between them."""

    def __init__(self, folder: Path, held_out: int = 2) -> None:
        spec = AdapterSpec(rank=1, alpha=1.0, seed=4, labels=3)
        self.looped = looped = Looped(write_bert(folder), spec, shares_of((1, 2, 1), (8, 40, 16)), ENDS)
        rng = np.random.default_rng(3)
        self.rows = {
            device: Split(rows_of(rng, 4 + place, 16, 3), rows_of(rng, held_out, 16, 3) if held_out else ())
            for place, device in enumerate(ENDS)
        }
        self.task = task_of(spec, STEPS, batch_rows=2, labels=("x", "y", "z"), row_tokens=16, blocks=True)
        self.sent: deque[tuple[str, Parcel]] = deque()
        self.senders: dict[str, Sender] = {}
        self.works: dict[str, SplitWork] = {}
        self.told: list[Parcel] = []
        self.order = StageOrder(
            deployment="tune-n", epoch=7, stage=0, stages=256, model="m", engine="torch", graph=self.task.tokenizer,
            weights=(), embedding=False, head=False, first_block=0, end_block=4, hidden=32, vocabulary=16,
            wire_dtype="f32", context_tokens=16, slots=1, prefill_chunk_tokens=2,
            inbox=InboxAddress(topic=REPLY), next=InboxAddress(topic=REPLY), runs="rounds", training=self.task,
        )  # fmt: skip
        nothing = Split((), ())
        parts: list[tuple[str, str, Any, Part]] = [("h", "h", HubWork, Part(looped.hub, looped.shaped_of[0], nothing))]
        for number, stage in enumerate(looped.shards):
            part = Part(stage, looped.shaped_of[number + 1], nothing)
            parts.append((f"s{number + 1}", SHARDS[number], ShardWork, part))
        parts += [(name, name, EndsWork, Part(looped.ends[name], looped.shaped, self.rows[name])) for name in ENDS]
        for work, device, kind, part in parts:
            sender = self.senders[work] = Sender(self.sent)
            self.works[work] = kind(self.order, part, sender, lambda _: None, Stretch(1.0, 1), SITE, device)

    def ask(self, work: str, session: int = 5, train: bool = True, start: Floats | None = None) -> None:
        place = None if work in ENDS else max(0, WORKS.index(work) - 1)
        shards = tuple(peer_of(f"s{number + 1}", device) for number, device in enumerate(SHARDS))
        meta = RoundMeta(
            reply=InboxAddress(topic=REPLY), round=2, parts=PARTS, train=train,
            split=SplitRound(
                session=session, segments=(peer_of("h"),), place=place,
                ends=() if place is None else tuple(map(peer_of, ENDS)), patience_s=30.0,
                shards=() if place is None else shards,
            ),
        )  # fmt: skip
        vectors = self.looped.vectors_of(self.looped.start)
        tensor = None if place is None else Tensor.of(vectors[WORKS.index(work)] if start is None else start)
        request = 100 * session + WORKS.index(work)
        self.give(work, Parcel(Kind.ROUND, 7, request, 0, 0, tensor, msgspec.json.encode(meta)))

    def ask_all(self, session: int = 5, train: bool = True) -> None:
        for work in WORKS:
            self.ask(work, session, train)

    def give(self, work: str, parcel: Parcel) -> None:
        self.works[work].accept(Delivery(parcel), 0.0)  # type: ignore[arg-type]

    def turn(self, change: Any = lambda topic, parcel: parcel, backwards: bool = False) -> bool:
        """Let all work and hear what was sent, as `change` leaves it; False if nothing happened. `backwards`: what was
        sent last comes first, but of one sender in its order."""
        moved = False
        for work in reversed(self.works.values()) if backwards else self.works.values():
            while work.runnable:
                moved = work.work(0.0) or moved
        sent = [self.sent.popleft() for _ in range(len(self.sent))]
        for topic, was in sent:
            moved = True
            parcel = change(topic, was)
            to = next((name for name in self.works if inbox(name) == topic), "")
            if to and parcel is not None:
                self.give(to, parcel)
            elif not to:
                self.told.append(was)
        return moved

    def through(self, **options: Any) -> None:
        while self.turn(**options):
            pass

    def updates(self) -> dict[str, tuple[UpdateMeta, Any]]:
        """By request's last digits: WORKS."""
        found = {}
        for parcel in self.told:
            assert parcel.kind is Kind.UPDATE, parcel.meta
            vector = None if parcel.tensor is None else parcel.tensor.array()
            found[WORKS[parcel.request % 100]] = msgspec.json.decode(parcel.meta, type=UpdateMeta), vector
        return found

    def vector(self) -> Floats:
        found = self.updates()
        return self.looped.joined([found[work][1] for work in WORKS[:4]])

    def errors(self) -> list[tuple[str, str, int | None, str]]:
        found = [msgspec.json.decode(one.meta, type=StageError) for one in self.told if one.kind is Kind.ERROR]
        self.told.clear()
        return [(error.code, error.device, error.shard, error.text) for error in found]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def changed(kind: Kind, change: Any, place: int | None = None) -> Any:
    """What is said of this kind, of a shard or of a board with data, with other numbers; None: nothing."""

    def of(_topic: str, parcel: Parcel) -> Parcel | None:
        if parcel.kind is not kind or msgspec.json.decode(parcel.meta, type=SplitMeta).place != place:
            return parcel
        if change is None:
            return None
        assert parcel.tensor is not None
        values = np.ascontiguousarray(change(parcel.tensor.array()), np.float32)
        return msgspec.structs.replace(parcel, tensor=Tensor.of(values))

    return of


def test_a_round_comes_to_what_one_place_comes_to_in_whatever_order(bench: Bench, tmp_path: Path) -> None:
    bench.ask_all()
    bench.through()
    updates = bench.updates()
    assert set(updates) == set(WORKS)
    seeds = {device: device_seed(bench.task.seed, device) for device in ENDS}
    one = InOnePlace(bench.looped.whole, bench.rows, bench.task, bench.looped.start, PARTS, seeds)
    for _ in range(STEPS):
        one.step()
    expected = named(one.vector(), bench.looped.shaped)
    for name, values in named(bench.vector(), bench.looped.shaped).items():
        if name != "block.0.k.bias.w":  # its gradient is zero, but for rounding
            np.testing.assert_allclose(values, expected[name], atol=2e-4, err_msg=name)
    assert all(updates[work][0].samples == 4 + 5 for work in WORKS[:4])
    assert all(updates[device][0].held_out_count == 2 and updates[device][0].loss for device in ENDS)
    assert not any(work.live or work.runnable for work in bench.works.values())
    sent, got = ([getattr(meta, f"peer_{what}_bytes") for meta, _ in updates.values()] for what in ("sent", "got"))
    assert sum(sent) == sum(got)
    (tmp_path / "other").mkdir()
    other = Bench(tmp_path / "other")
    for work in reversed(WORKS):
        other.ask(work)
        other.turn(backwards=True)
    other.through(backwards=True)
    assert np.array_equal(other.vector(), bench.vector())


def test_no_weight_and_no_gradient_of_one_crosses_the_network(bench: Bench) -> None:
    shapes = set()

    def look(_topic: str, parcel: Parcel) -> Parcel:
        if parcel.kind in (Kind.SHARE, Kind.PARTIAL):
            assert parcel.tensor is not None
            shapes.add(parcel.tensor.shape[-1])
        elif parcel.kind is Kind.STEP:
            assert parcel.tensor is None
        return parcel

    bench.ask_all()
    bench.through(change=look)
    assert shapes == {32}, "as wide as the model, and states or their gradients"


def test_what_is_lost_is_begun_anew_and_comes_to_the_same(bench: Bench) -> None:
    bench.ask_all()
    bench.through()
    first = bench.vector()
    bench.told.clear()
    for session, lost in ((6, "s2"), (7, "h")):
        bench.ask_all(session)
        for _ in range(20 + session):
            bench.turn()
        assert not bench.told
        bench.works[lost].drop_all()
        bench.works[lost].tick(1.0)
        bench.turn()
        assert [error[0] for error in bench.errors()] == ["again"]
    bench.ask_all(8)
    bench.through()
    assert np.array_equal(bench.vector(), first)


def test_what_is_judged_alone_trains_nothing(bench: Bench) -> None:
    bench.ask_all(train=False)
    bench.through()
    updates = bench.updates()
    assert set(updates) == set(WORKS) and all(vector is None for _, vector in updates.values())
    assert all(updates[device][0].held_out_loss is not None for device in ENDS)


WRONG: dict[str, Any] = {
    "a part that is no numbers": lambda values: values * np.nan,
    "was due": lambda values: values[:, :-1] if values.shape[1] > 1 else values[..., :-1],
}


@pytest.mark.parametrize("words", sorted(WRONG))
def test_a_shard_that_sends_what_can_t_be_is_named(words: str, bench: Bench) -> None:
    bench.ask_all()
    for _ in range(5):
        bench.turn(changed(Kind.PARTIAL, WRONG[words], 1))
    assert [(*error[:3], words in error[3]) for error in bench.errors()][:1] == [("protocol", "a", 1, True)]


def test_who_sends_gradients_or_states_that_can_t_be_is_named(bench: Bench) -> None:
    bench.ask_all()
    bench.through(change=changed(Kind.GRADIENT, lambda values: values * 1e6))
    assert {(*error[:3], "at most" in error[3]) for error in bench.errors()} == {
        ("protocol", device, None, True) for device in ENDS
    }
    bench.ask_all(6)
    bench.through(change=changed(Kind.STATES, lambda values: values[:, :, :-1]))
    assert {error[:3] for error in bench.errors()} == {("protocol", device, None) for device in ENDS}
    bench.ask_all(7)
    bench.through(change=changed(Kind.STATES, lambda values: values * 1e30))
    said = bench.errors()
    assert {error[0] for error in said} == {"protocol"} and {error[1] for error in said} <= set(ENDS), said


def test_a_hub_names_whom_it_waits_for(bench: Bench) -> None:
    for work in WORKS[:-1]:
        bench.ask(work)
    bench.through()
    hub: Any = bench.works["h"]
    hub._heard_s = dict.fromkeys(ENDS, 100.0)
    hub.tick(129.0)
    hub.tick(131.0)
    hub.tick(132.0)
    bench.turn()
    assert [error[:3] for error in bench.errors()] == [("deadline", "b", None)]
    bench.ask_all(6)
    bench.through(change=changed(Kind.PARTIAL, None, 2))
    hub._asked_s, hub._heard_s = 100.0, dict.fromkeys(ENDS, 100.0)
    hub.tick(131.0)
    bench.turn()
    assert [error[:3] for error in bench.errors()] == [("deadline", "u", 2)], "nobody else can go on"


def test_what_nobody_asked_for_is_not_heard(bench: Bench) -> None:
    bench.ask("h")
    bench.ask("s1")
    states = Tensor.of(np.zeros((1, 3, 32), np.float32))
    turn = Turn(number=0, part="attention")
    of_a = {"device": "a", "step": 0, "lengths": (3,)}
    for work, kind, fields in (
        ("h", Kind.SHARE, {"turn": turn}), ("h", Kind.PARTIAL, {"place": 9, "turn": turn}),
        ("h", Kind.FEATURES, {}), ("s1", Kind.PARTIAL, {"turn": turn}), ("s1", Kind.STATES, {"samples": 1}),
    ):  # fmt: skip
        bench.give(work, Parcel(kind, 7, 5, 0, 0, states, msgspec.json.encode(SplitMeta(**of_a, **fields))))
        bench.through()
        assert bench.works[work].last_refusal == f"{kind.name} of a was not asked for"
    for work, kind, fields in (
        ("h", Kind.PARTIAL, {"place": 1, "turn": turn}),
        ("h", Kind.GRADIENT, {}),
        ("s1", Kind.STEP, {"square": 1.0}),
        ("s1", Kind.SHARE, {"turn": Turn(number=1, part="attention", backwards=True), "step": 3}),
    ):
        before = bench.works[work].tally.stale
        bench.give(work, Parcel(kind, 7, 5, 0, 0, states, msgspec.json.encode(SplitMeta(**{**of_a, **fields}))))
        bench.through()
        assert bench.works[work].tally.stale == before + 1
    assert not bench.told


@pytest.mark.parametrize(
    ("shape", "lengths", "backwards"),
    [((1, 3, 31), (3,), False), ((1, 3, 32), (4,), False), ((1, 3, 32), (), False), ((1, 3, 32), (3,), True),
     ((3, 1, 3, 32), (3,), True), ((1, 17, 32), (17,), False), ((3, 3, 32), (3, 3, 3), False)],
)  # fmt: skip
def test_a_shard_ends_a_round_whose_hub_sends_nonsense(
    shape: tuple[int, ...], lengths: tuple[int, ...], backwards: bool, bench: Bench
) -> None:
    bench.ask("s1")
    meta = SplitMeta(device="a", step=0, lengths=lengths, turn=Turn(number=0, part="attention", backwards=backwards))
    tensor = Tensor.of(np.zeros(shape, np.float32))
    bench.give("s1", Parcel(Kind.SHARE, 7, 5, 0, 0, tensor, msgspec.json.encode(meta)))
    bench.through()
    [error] = bench.errors()
    assert error[:3] == ("engine", "s", None) and "the hub sends" in error[3]
    assert not bench.works["s1"].live


def test_a_round_that_can_t_begin_is_told(bench: Bench) -> None:
    for work in ("h", "s1"):
        bench.ask(work, start=np.zeros(3, np.float32))
        bench.through()
        [error] = bench.errors()
        assert error[0] == "engine" and "3 numbers" in error[3]


def test_orders_of_shards_are_checked(bench: Bench) -> None:
    share = Share(first_head=0, end_head=1, first_column=0, end_column=8)
    for role, mine, words in (
        ("shard", share, ""), ("hub", None, ""), ("shard", None, "belong together"), ("hub", share, "belong together"),
    ):  # fmt: skip
        training = msgspec.structs.replace(bench.task, role=role, share=mine)
        order = order_of(embedding=False, head=False, end_block=4, training=training, runs="rounds")
        assert words in problem_with(desired_of(order), FAKE_SITE, DEVICE)
        assert bool(words) == bool(problem_with(desired_of(order), FAKE_SITE, DEVICE))
