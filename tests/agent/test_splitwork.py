"""Workers with the ends of a model, and the one with its trunk: what they say to each other, and when it is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from agent.orders import problem_with  # noqa: E402
from agent.workers.endswork import EndsWork  # noqa: E402
from agent.workers.roundwork import device_seed  # noqa: E402
from agent.workers.splitwork import SplitWork  # noqa: E402
from agent.workers.stretch import Stretch  # noqa: E402
from agent.workers.trunkwork import TrunkWork  # noqa: E402
from models.formats.bert import read_bert_config  # noqa: E402
from models.lora.adapter import AdapterSpec, flat, initial, named, shapes  # noqa: E402
from models.training.samples import Split  # noqa: E402
from tests.agent.fakes import DEVICE, desired_of, order_of  # noqa: E402
from tests.agent.fakes import SITE as FAKE_SITE  # noqa: E402
from tests.agent.training_fakes import Delivery, Sender  # noqa: E402
from tests.models.tiny_bert import write_bert  # noqa: E402
from tests.training.split_models import Halves, InOnePlace, bert, rows_of, task_of  # noqa: E402
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
from wire.transport import NotConnected  # noqa: E402

pytestmark = pytest.mark.torch

SITE = "lab"
ENDS = ("a", "b")
PARTS = ("a", "b", "c")
STEPS = 3
SPEC = AdapterSpec(rank=2, alpha=4.0, matrices=("q", "v"), seed=4, labels=3)


def inbox(device: str) -> str:
    return f"edgelam/v1/{SITE}/act/tune-n/{'trunkab'.index(device[0])}/in"


def peer_of(name: str) -> Peer:
    return Peer(device=name, inbox=InboxAddress(topic=inbox(name)))


REPLY = f"edgelam/v1/{SITE}/act/requester-1/0/in"


class Part:
    def __init__(self, stage: Any, shaped: Any, rows: Split) -> None:
        self.stage, self.shaped, self.rows, self.bad_rows = stage, shaped, rows, 1


class Bench:
    """A trunk, cut before these blocks, and two ends, and what is on its way between them."""

    spec, parts = SPEC, PARTS
    doing: dict[str, Any] = {"labels": ("x", "y", "z")}  # noqa: RUF012

    @staticmethod
    def model(folder: Path, cuts: tuple[int, ...]) -> tuple[Halves, dict[str, Any]]:
        """And the factors that it begins with."""
        write_bert(folder)
        begun = initial(read_bert_config(folder), SPEC)
        return bert(folder, SPEC, ENDS, begun, cuts), begun

    def __init__(self, folder: Path, held_out: int = 2, cuts: tuple[int, ...] = ()) -> None:
        self.segments = ("t", "u", "n")[: len(cuts) + 1]
        self.halves, begun = self.model(folder, cuts)
        config, labels = self.halves.config, self.spec.labels
        self.shaped = shapes(config, self.spec)
        self.start = flat(begun, self.shaped)
        rng = np.random.default_rng(3)
        self.rows = {
            device: Split(rows_of(rng, 4 + place, 16, labels), rows_of(rng, held_out, 16, labels) if held_out else ())
            for place, device in enumerate(ENDS)
        }
        self.task = task_of(self.spec, STEPS, batch_rows=2, row_tokens=16, **self.doing)
        self.sent: deque[tuple[str, Parcel]] = deque()
        self.senders: dict[str, Sender] = {}
        self.works: dict[str, SplitWork] = {}
        self.told: list[Parcel] = []
        self.returned = 0
        order = StageOrder(
            deployment="tune-n", epoch=7, stage=0, stages=256, model="m", engine="torch", graph=self.task.tokenizer,
            weights=(), embedding=True, head=True, first_block=0, end_block=0, hidden=config.hidden, vocabulary=16,
            wire_dtype="f32", context_tokens=16, slots=1, prefill_chunk_tokens=2,
            inbox=InboxAddress(topic=REPLY), next=InboxAddress(topic=REPLY), runs="rounds", training=self.task,
        )  # fmt: skip
        for device in (*self.segments, *ENDS):
            sender = self.senders[device] = Sender(self.sent)
            has_blocks = device in self.segments
            stage = self.halves.segments[self.segments.index(device)] if has_blocks else self.halves.ends[device]
            shaped = self.shaped_of(device) if has_blocks else self.shaped
            part = Part(stage, shaped, self.rows.get(device, Split((), ())))
            kind = TrunkWork if has_blocks else EndsWork
            self.works[device] = kind(order, part, sender, self._done, Stretch(1.0, 1), SITE, device)  # type: ignore[arg-type]

    def shaped_of(self, segment: str) -> Any:
        return self.halves.shaped_of(self.segments.index(segment))

    def _done(self, _delivery: Any) -> None:
        self.returned += 1

    def ask(self, device: str, session: int = 5, request: int | None = None, train: bool = True) -> None:
        segments, ends = (tuple(map(peer_of, names)) for names in (self.segments, ENDS))
        place = self.segments.index(device) if device in self.segments else None
        meta = RoundMeta(
            reply=InboxAddress(topic=REPLY), round=2, parts=self.parts, train=train,
            split=SplitRound(
                session=session, segments=segments, place=place, ends=ends if place is not None else (), patience_s=30.0
            ),
        )  # fmt: skip
        request = request or session * 10 + (*self.segments, *ENDS).index(device)
        start = named(self.start, self.shaped)
        factors = flat(start, self.shaped_of(device)) if device in self.segments else np.zeros(0)
        tensor = Tensor.of(factors) if factors.size else None
        self.give(device, Parcel(Kind.ROUND, 7, request, 0, 0, tensor, msgspec.json.encode(meta)))

    def give(self, device: str, parcel: Parcel) -> None:
        self.works[device].accept(Delivery(parcel), 0.0)  # type: ignore[arg-type]

    def turn(self) -> bool:
        """Let all work and hear what was sent; False if nothing happened."""
        moved = False
        for work in self.works.values():
            while work.runnable:
                moved = work.work(0.0) or moved
        while self.sent:
            topic, parcel = self.sent.popleft()
            moved = True
            to = next((name for name in self.works if inbox(name) == topic), "")
            if to:
                self.give(to, parcel)
            else:
                assert topic == REPLY
                self.told.append(parcel)
        return moved

    def turn_but(self, kind: Kind) -> bool:
        """A turn in which nothing of this kind comes through."""
        for work in self.works.values():
            while work.runnable:
                work.work(0.0)
        self.sent = deque(one for one in self.sent if one[1].kind is not kind)
        for sender in self.senders.values():
            sender.sent = self.sent
        return self.turn()

    def turn_with(self, device: str, kind: Kind, change: Any) -> None:
        """A turn in which what a device says of this kind is changed."""
        for work in self.works.values():
            while work.runnable:
                work.work(0.0)
        for _ in range(len(self.sent)):
            topic, parcel = self.sent.popleft()
            if parcel.kind is kind and msgspec.json.decode(parcel.meta, type=SplitMeta).device == device:
                assert parcel.tensor is not None
                values = np.ascontiguousarray(change(parcel.tensor.array()), np.float32)
                parcel = msgspec.structs.replace(parcel, tensor=Tensor.of(values))
            self.sent.append((topic, parcel))
        self.turn()

    def through(self) -> None:
        while self.turn():
            pass

    def updates(self) -> dict[str, tuple[UpdateMeta, Any]]:
        found = {}
        for parcel in self.told:
            assert parcel.kind is Kind.UPDATE, parcel.meta
            meta = msgspec.json.decode(parcel.meta, type=UpdateMeta)
            found[meta.device] = meta, None if parcel.tensor is None else parcel.tensor.array()
        return found

    def factors(self) -> Any:
        """What the segments came to."""
        found = self.updates()
        return np.concatenate([found[name][1] for name in self.segments if found[name][1] is not None])

    def errors(self) -> list[StageError]:
        found = [msgspec.json.decode(one.meta, type=StageError) for one in self.told if one.kind is Kind.ERROR]
        self.told.clear()
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path)


def expected(bench: Bench) -> Any:
    seeds = {device: device_seed(bench.task.seed, device) for device in ENDS}
    one = InOnePlace(bench.halves, bench.rows, bench.task, bench.start, bench.parts, seeds)
    for _ in range(STEPS):
        one.step()
    return one.vector()


@pytest.mark.parametrize("order", [("u", "t", "a", "n", "b"), ("a", "n", "b", "t", "u"), ("b", "t", "u", "n", "a")])
@pytest.mark.parametrize("cuts", [(1,), (1, 3)])
def test_segments_come_to_what_one_trunk_comes_to_bit_by_bit(
    order: tuple[str, ...], cuts: tuple[int, ...], bench: Bench, tmp_path: Path
) -> None:
    for device in bench.works:
        bench.ask(device)
    bench.through()
    (tmp_path / "cut").mkdir()
    cut = Bench(tmp_path / "cut", cuts=cuts)
    for device in order:
        if device in cut.works:
            cut.ask(device)
            cut.through()
    assert set(cut.updates()) == {*cut.segments, *ENDS}
    assert np.array_equal(cut.factors(), bench.factors())
    np.testing.assert_allclose(cut.factors(), expected(cut), atol=1e-5)
    for device in ENDS:
        assert cut.updates()[device][0].held_out_loss == bench.updates()[device][0].held_out_loss
    assert all(cut.updates()[name][0].samples == 4 + 5 for name in cut.segments)
    for one in (bench, cut):
        first, *others = (one.updates()[name][0].own_s for name in one.segments)
        assert set(first) == set(ENDS) and min(first.values()) > 0, "timed by who hears their states first"
        assert not any(others)
    assert all(not work.live and not work.runnable and not work._waiting for work in cut.works.values())


def test_a_segment_that_loses_its_connection_loses_the_round_and_it_comes_to_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cuts=(2,))
    for device in bench.works:
        bench.ask(device)
    for _ in range(6):
        bench.turn()
    bench.told.clear()
    bench.works["u"].drop_all()
    bench.works["u"].tick(1.0)
    bench.through()
    assert [(error.code, error.device) for error in bench.errors()] == [("again", "u")]
    assert {inbox("t"), inbox("a"), inbox("b")} <= set(bench.senders["u"].dropped)
    for device in reversed(bench.works):
        bench.ask(device, session=6)
    bench.through()
    np.testing.assert_allclose(bench.factors(), expected(bench), atol=1e-5)


def test_segments_name_those_alone_that_they_hear_themselves(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cuts=(1, 3), held_out=0)
    for device in (*bench.segments, "a"):
        bench.ask(device)
    while bench.turn_but(Kind.GRADIENT):
        pass
    for name in bench.segments:
        bench.works[name]._heard_s = dict.fromkeys(ENDS, 100.0)  # type: ignore[attr-defined]
        bench.works[name].tick(131.0)
    bench.turn()
    said = [(error.code, error.device, error.stage) for error in bench.errors()]
    assert sorted(one[:2] for one in said) == [("deadline", "a"), ("deadline", "b")], "no gradient; no states"


def test_nobody_is_blamed_for_states_that_another_segment_has(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cuts=(1,))
    for device in ("t", *ENDS):
        bench.ask(device)
    bench.through()  # the other segment never begins: what is held out waits there
    bench.works["t"]._heard_s = dict.fromkeys(ENDS, 100.0)  # type: ignore[attr-defined]
    bench.works["t"].tick(131.0)
    bench.turn()
    assert not bench.told


def test_what_another_segment_is_to_say_is_not_heard_of_anybody_else(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cuts=(1,))
    bench.ask("u")
    states, row = Tensor.of(np.zeros((1, 3, 32), np.float32)), Tensor.of(np.zeros(96, np.float32))
    for kind, tensor, fields in (
        (Kind.STATES, states, {"lengths": (3,), "samples": 1}),
        (Kind.GRADIENT, row, {"place": 1}),
        (Kind.STEP, None, {"place": 1, "square": 1.0}),
        (Kind.FEATURES, row, {"place": 1}),
    ):
        meta = SplitMeta(device="a", step=0, **fields)
        bench.give("u", Parcel(kind, 7, 5, 0, 0, tensor, msgspec.json.encode(meta)))
        bench.through()
        assert bench.works["u"].last_refusal == f"{kind.name} of a was not asked for"
    early = SplitMeta(device="a", place=0, step=0, square=1.0)
    bench.give("u", Parcel(Kind.STEP, 7, 5, 0, 0, None, msgspec.json.encode(early)))
    bench.through()
    assert bench.works["u"].tally.stale == 1 and not bench.told


@pytest.mark.parametrize("order", [("t", "a", "b"), ("a", "b", "t"), ("b", "t", "a")])
def test_a_round_comes_to_what_one_place_comes_to(order: tuple[str, ...], bench: Bench) -> None:
    for device in order:
        bench.ask(device)
        bench.through()
    updates = bench.updates()
    assert set(updates) == {"t", *ENDS}
    np.testing.assert_allclose(updates["t"][1], expected(bench), atol=1e-5)
    assert updates["t"][0].samples == 4 + 5 and updates["t"][0].loss is None
    sent = sum(updates[device][0].peer_sent_bytes for device in ENDS)
    assert sent == updates["t"][0].peer_got_bytes > 0
    assert updates["t"][0].peer_sent_bytes == sum(updates[device][0].peer_got_bytes for device in ENDS)
    for place, device in enumerate(ENDS):
        meta, vector = updates[device]
        assert vector is None and meta.samples == 4 + place and meta.held_out_count == 2 and meta.loss is not None
    assert all(not work.live and not work.runnable for work in bench.works.values())
    assert bench.returned > 10, "credit is returned for all that came"


def test_the_same_question_again_is_answered_again_and_an_older_session_is_not_heard(bench: Bench) -> None:
    for device in bench.works:
        bench.ask(device)
    bench.through()
    first = bench.updates()["t"][1]
    bench.told.clear()
    for device in bench.works:
        bench.ask(device)
    bench.through()
    assert np.array_equal(bench.updates()["t"][1], first) and len(bench.told) == 3
    bench.told.clear()
    for device in bench.works:
        bench.ask(device, session=6)
    bench.turn()
    stray = SplitMeta(device="a", step=0, samples=4, lengths=(3,))
    states = Tensor.of(np.zeros((1, 3, 32), np.float32))
    bench.give("t", Parcel(Kind.STATES, 7, 5, 0, 0, states, msgspec.json.encode(stray)))
    bench.through()
    assert np.array_equal(bench.updates()["t"][1], first), "begun anew it comes to the same"


def test_a_lost_connection_loses_the_round_and_is_told_when_it_is_back(bench: Bench) -> None:
    for device in bench.works:
        bench.ask(device)
    bench.turn()
    bench.works["a"].drop_all()
    bench.senders["a"].down = True
    assert not bench.works["a"].live
    bench.works["a"].tick(1.0)
    assert not bench.told
    bench.senders["a"].down = False
    bench.works["a"].tick(2.0)
    bench.works["a"].tick(3.0)
    bench.through()
    [error] = bench.errors()
    assert (error.code, error.device) == ("again", "a")
    assert inbox("t") in bench.senders["a"].dropped, "what was on its way is of no use"
    for device in bench.works:
        bench.ask(device, session=6)
    bench.through()
    np.testing.assert_allclose(bench.updates()["t"][1], expected(bench), atol=1e-5)


def test_what_is_judged_alone_trains_nothing(bench: Bench) -> None:
    for device in bench.works:
        bench.ask(device, train=False)
    bench.through()
    updates = bench.updates()
    assert updates["t"][1] is None
    assert all(updates[device][0].held_out_count == 2 and updates[device][0].loss is None for device in ENDS)


def test_the_trunk_names_whom_it_waits_for(bench: Bench) -> None:
    bench.ask("t")
    bench.ask("a")
    bench.through()
    trunk = bench.works["t"]
    trunk._heard_s = dict.fromkeys(ENDS, 100.0)  # type: ignore[attr-defined]
    trunk.tick(129.0)
    assert not bench.sent
    trunk.tick(131.0)
    trunk.tick(132.0)
    bench.through()
    assert [(error.code, error.device) for error in bench.errors()] == [("deadline", "b")]


WRONG: dict[str, Any] = {
    "gradients are no numbers": lambda values: np.where(np.arange(len(values)) == 1, np.nan, values),
    "were due": lambda values: values[:-2],
    "long, at most": lambda values: values * 1e6,
}


@pytest.mark.parametrize("words", sorted(WRONG))
def test_who_sends_gradients_that_can_t_be_is_named(words: str, bench: Bench) -> None:
    for device in bench.works:
        bench.ask(device)
    for _ in range(100):
        bench.turn_with("a", Kind.GRADIENT, WRONG[words])
        if bench.told:
            break
    [error] = bench.errors()
    assert (error.code, error.device) == ("protocol", "a") and words in error.text


def test_states_that_can_t_be_are_named(bench: Bench) -> None:
    good = {"device": "a", "step": 0, "samples": 4, "lengths": (3, 2)}
    states = np.zeros((2, 3, 32), np.float32)
    wrong = [
        (good, states[:, :, :-1], "states of"),
        (good, np.zeros((2, 17, 32), np.float32), "states of"),
        ({**good, "lengths": (3, 2, 1)}, np.zeros((3, 3, 32), np.float32), "states of"),
        (good, np.full_like(states, np.inf), "no numbers"),
        (good, np.full_like(states, 1e30), "makes no numbers of"),
        ({**good, "lengths": (3, 4)}, states, "lengths"),
        ({**good, "lengths": (3,)}, states, "lengths"),
        ({**good, "samples": 0}, states, "no samples"),
    ]
    for number, (fields, values, words) in enumerate(wrong):
        bench.ask("t", session=20 + number)
        meta = msgspec.json.encode(SplitMeta(**fields))
        tensor = Tensor.of(np.ascontiguousarray(values))
        bench.give("t", Parcel(Kind.STATES, 7, 20 + number, 0, 0, tensor, meta))
        bench.through()
        [error] = bench.errors()
        assert (error.code, error.device) == ("protocol", "a") and words in error.text


def test_what_is_nobody_s_is_counted_and_held_within_bounds(bench: Bench) -> None:
    trunk = bench.works["t"]
    tensor = Tensor.of(np.zeros((1, 3, 32), np.float32))
    for number in range(60):  # of sessions that it has not heard of
        meta = SplitMeta(device=f"d{number}", step=0, samples=1, lengths=(3,))
        bench.give("t", Parcel(Kind.STATES, 7, 99, 0, 0, tensor, msgspec.json.encode(meta)))
    assert len(trunk._early) == 48 and trunk.tally.stale == 12
    bench.ask("t")
    stranger = SplitMeta(device="c", step=0, samples=1, lengths=(3,))
    bench.give("t", Parcel(Kind.STATES, 7, 5, 0, 0, tensor, msgspec.json.encode(stranger)))
    assert "c does not take part" in trunk.last_refusal
    bench.give("t", Parcel(Kind.STATES, 7, 5, 0, 0, None, msgspec.json.encode(stranger)))
    bench.give("t", Parcel(Kind.STATES, 7, 5, 0, 0, tensor, b"no json"))
    bench.give("t", Parcel(Kind.TOKENS, 7, 5, 0, 0, tensor, b""))
    assert trunk.tally.refused == 4
    bench.give("t", Parcel(Kind.STATES, 8, 5, 0, 0, tensor, b""))
    assert trunk.tally.stale == 13
    assert not bench.sent and trunk.live


def test_a_round_without_anybody_or_elsewhere_is_refused(bench: Bench) -> None:
    elsewhere = Peer(device="a", inbox=InboxAddress(topic="edgelam/v1/other/act/x/0/in"))
    here = peer_of("a")
    for split in (
        None,
        SplitRound(session=3, segments=(elsewhere,), place=0, ends=(here,)),
        SplitRound(session=3, segments=(here,), place=1, ends=(here,)),
        SplitRound(session=3, segments=(here,), place=0),
        SplitRound(session=3, segments=(here,), ends=(here,)),
    ):
        meta = RoundMeta(reply=InboxAddress(topic=REPLY), round=2, parts=PARTS, split=split)
        bench.give("t", Parcel(Kind.ROUND, 7, 77, 0, 0, Tensor.of(bench.start), msgspec.json.encode(meta)))
        bench.through()
        [error] = bench.errors()
        assert (error.code, error.device) == ("engine", "t")
    assert not bench.works["t"].live


def test_close_ends_a_round(bench: Bench) -> None:
    for device in bench.works:
        bench.ask(device)
    bench.turn()
    for place, device in enumerate(("t", *ENDS)):
        bench.give(device, Parcel(Kind.CLOSE, 7, 50 + place))
    bench.sent.clear()
    assert not any(work.live or work.runnable for work in bench.works.values())


@pytest.mark.parametrize(
    ("role", "changes", "good"),
    [
        ("trunk", {"embedding": False, "head": False, "first_block": 0, "end_block": 4}, True),
        ("trunk", {"embedding": False, "head": True, "first_block": 0, "end_block": 4}, False),
        ("trunk", {"embedding": False, "head": False, "first_block": 1, "end_block": 4}, True),
        ("trunk", {"embedding": False, "head": False, "first_block": 2, "end_block": 2}, False),
        ("trunk", {"embedding": False, "head": False, "first_block": 0, "end_block": 0}, False),
        ("ends", {"embedding": True, "head": True, "first_block": 0, "end_block": 0}, True),
        ("ends", {"embedding": True, "head": True, "first_block": 0, "end_block": 1}, False),
        ("whole", {"embedding": True, "head": True, "first_block": 0, "end_block": 4}, True),
        ("whole", {"embedding": True, "head": False, "first_block": 0, "end_block": 4}, False),
    ],
)
def test_an_order_has_the_part_of_its_role(role: Any, changes: dict[str, Any], good: bool) -> None:
    order = order_of(engine="torch", runs="rounds", training=task_of(SPEC, 1, role=role), **changes)
    said = problem_with(desired_of(order), FAKE_SITE, DEVICE)
    assert said == "" if good else said.endswith(f"are no {role}")


def test_who_says_more_than_it_was_asked_for_is_named_and_held_within_bounds(bench: Bench) -> None:
    bench.ask("t")
    tensor = Tensor.of(np.zeros((1, 3, 32), np.float32))
    for step in range(5):
        meta = SplitMeta(device="a", step=step, samples=1, lengths=(3,))
        bench.give("t", Parcel(Kind.STATES, 7, 5, 0, 0, tensor, msgspec.json.encode(meta)))
    assert len(bench.works["t"]._said) == 2
    bench.sent = deque(one for one in bench.sent if one[0] == REPLY)
    bench.told = [parcel for _, parcel in bench.sent]
    found = bench.errors()
    assert {(error.code, error.device, error.text) for error in found} == {
        ("protocol", "a", "says more than it was asked for")
    }


def test_who_takes_nothing_holds_up_nobody_else(bench: Bench) -> None:
    sender = bench.senders["t"]
    plain = sender.to_requester

    def but_for_a(topic: str, parcel: Parcel) -> None:
        if topic == inbox("a"):
            raise NotConnected("no credit")
        plain(topic, parcel)

    sender.to_requester = but_for_a  # type: ignore[method-assign]
    for device in bench.works:
        bench.ask(device)
    bench.through()
    assert bench.works["b"]._round_of._judged == 1, "it was answered"  # type: ignore[attr-defined]
    sender.to_requester = plain  # type: ignore[method-assign]
    bench.works["t"].tick(1.0)
    bench.through()
    np.testing.assert_allclose(bench.updates()["t"][1], expected(bench), atol=1e-5)


def test_a_connection_that_is_lost_behind_the_answer_loses_the_round_too(bench: Bench) -> None:
    """The last gradient may not have come through."""
    for device in bench.works:
        bench.ask(device)
    bench.through()
    bench.told.clear()
    bench.works["a"].drop_all()
    bench.works["a"].tick(1.0)
    bench.turn()
    kinds = [parcel.kind for parcel in bench.told]
    assert Kind.ERROR in kinds
    bench.told = [parcel for parcel in bench.told if parcel.kind is Kind.ERROR]
    [error] = bench.errors()
    assert (error.code, error.device) == ("again", "a")
