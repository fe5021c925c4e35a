"""Items over deployments that come and go, with stages in memory that add one to each byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.asked import checked
from coordinator.items.live import Item, LiveItem
from coordinator.items.requests import ItemsRequest, TensorBody, form_of, item_of, tensor_of
from coordinator.items.serve import ITEM_TIMEOUT_S, at_once, timeout_s
from coordinator.journal import DeployRequest
from coordinator.losses import Lost
from models.items.manifest import ROWS, Port, bundle
from wire import topics
from wire.errors import Busy, EdgelamError, PeerError, Refused, UsageError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.limits import MAX_BACKLOG_BYTES
from wire.messages import InboxAddress, ItemMeta, StageError, StageTime

REPLY = InboxAddress(topic=topics.INBOX.on("lab", "requester-1", "0"))
OUTPUTS = (Port("scores", "f32", (2,)),)


def answer(request: int = 5, epoch: int = 3, size: int = 8, **changes: Any) -> Parcel:
    meta = msgspec.json.encode(ItemMeta(reply=REPLY, rows=1, stages=(StageTime(0.5, 8),)))
    parcel = Parcel(Kind.ITEM, epoch, request, 0, FLAG_FINAL, Tensor.of(np.zeros(size, np.uint8)), meta)
    return msgspec.structs.replace(parcel, **changes)


def outcome(feed: Callable[[LiveItem], None], timeout_s: float = 0.05) -> Any:
    async def ask() -> Any:
        live = LiveItem(5, "net", 3, Item(np.zeros(4, np.uint8), 1), OUTPUTS, REPLY)
        parcel = live.parcel()
        assert parcel.kind is Kind.ITEM and msgspec.json.decode(parcel.meta, type=ItemMeta).rows == 1
        feed(live)
        return await live.result(timeout_s)

    return asyncio.run(ask())


def test_an_answer_is_taken_once_with_what_the_stages_took() -> None:
    def twice(live: LiveItem) -> None:
        live.feed(answer())
        live.feed(answer(size=9))

    result = outcome(twice)
    assert result.data.nbytes == 8 and result.stages == (StageTime(0.5, 8),) and result.item_s >= 0


def test_an_answer_of_another_epoch_is_none_and_silence_is_a_loss() -> None:
    with pytest.raises(Lost, match="no answer"):
        outcome(lambda live: live.feed(answer(epoch=4)))


@pytest.mark.parametrize(
    "parcel", [answer(size=9), answer(meta=b"{"), answer(tensor=Tensor.of(np.zeros(8, np.float32)))]
)
def test_an_answer_that_can_not_be_one_fails_the_item(parcel: Parcel) -> None:
    with pytest.raises(PeerError):
        outcome(lambda live: live.feed(parcel))


@pytest.mark.parametrize(("code", "kind"), [("stopped", Lost), ("busy", Busy), ("engine", EdgelamError)])
def test_what_a_stage_tells_is_raised(code: Any, kind: type[EdgelamError]) -> None:
    told = msgspec.json.encode(StageError(stage=1, device="pi5", code=code, text="so it is"))
    with pytest.raises(kind, match="pi5"):
        outcome(lambda live: live.feed(Parcel(Kind.ERROR, 3, 5, meta=told)))


def packed_of(*inputs: Port, most_rows: int = 8, widest_bytes: int = 1000) -> Any:
    parts = SimpleNamespace(widest_bytes=lambda: widest_bytes)
    graph = SimpleNamespace(items=SimpleNamespace(rows=4))
    return SimpleNamespace(config=SimpleNamespace(inputs=inputs, most_rows=most_rows), parts=parts, graph=graph)


def body(array: Any) -> TensorBody:
    names = {"float32": "f32", "int64": "i64"}
    return TensorBody(dtype=names[str(array.dtype)], shape=array.shape, data=array.tobytes())  # type: ignore[arg-type]


def test_tensors_become_items_and_come_back() -> None:
    tokens, mask = Port("tokens", "i64", (1, ROWS)), Port("mask", "f32", (ROWS, 2))
    given = {"tokens": np.arange(3, dtype=np.int64)[None], "mask": np.ones((3, 2), np.float32)}
    made = item_of(packed_of(tokens, mask), 0, {name: body(array) for name, array in given.items()})
    assert made.rows == 3
    np.testing.assert_array_equal(made.data, bundle([tokens, mask], 3, given))
    alone = item_of(packed_of(tokens), 0, {"": body(given["tokens"])})
    assert alone.rows == 3
    back = tensor_of(msgspec.to_builtins(body(given["mask"])))
    np.testing.assert_array_equal(back, given["mask"])
    assert form_of(tokens) == "i64 [1, rows]"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "no inputs"),
        ({"other": np.zeros((1, 3), np.int64)}, "other"),
        ({"tokens": np.zeros((1, 3), np.float32)}, "f32"),
        ({"tokens": np.zeros((2, 3), np.int64)}, r"\[2, 3\]"),
        ({"tokens": np.zeros((3,), np.int64)}, r"\[3\]"),
        ({"tokens": np.zeros((1, 9), np.int64)}, "9 rows"),
    ],
)
def test_what_does_not_fit_the_inputs_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    packed = packed_of(Port("tokens", "i64", (1, ROWS)))
    with pytest.raises(UsageError, match=words):
        item_of(packed, 0, {name: body(array) for name, array in given.items()})


def test_bytes_that_are_not_what_their_shape_says_are_refused_at_both_ends() -> None:
    short = TensorBody(dtype="i64", shape=(1, 3), data=bytes(23))
    with pytest.raises(UsageError, match="23 bytes"):
        item_of(packed_of(Port("tokens", "i64", (1, ROWS))), 0, {"tokens": short})
    with pytest.raises(UsageError, match="no tensor"):
        tensor_of(msgspec.to_builtins(short))


def test_as_many_items_are_on_their_way_as_senders_can_queue() -> None:
    plan: Any = SimpleNamespace(slots=8, predicted_token_s=1.0, predicted_slowest_s=0.5)
    assert at_once(plan, packed_of()) == 8
    assert at_once(plan, packed_of(widest_bytes=MAX_BACKLOG_BYTES // 6)) == 3
    assert at_once(plan, packed_of(widest_bytes=MAX_BACKLOG_BYTES * 2)) == 1
    assert timeout_s(plan, packed_of(), 4) == ITEM_TIMEOUT_S < timeout_s(plan, packed_of(), 16)


def test_a_request_names_its_deployment() -> None:
    asked = ItemsRequest(model="net", texts=("a",), boards_at_least=2, slots=3).deploy()
    assert (asked.model, asked.boards_at_least, asked.slots) == ("net", 2, 3)


def test_what_only_language_models_have_is_refused_for_others(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(b"")
    plain = checked(DeployRequest(model=str(model)))
    assert plain.precision == "f32"
    for changes in (
        {"precision": "int8"},
        {"error_budget_percent": 1.0},
        {"objective": "ttft"},
        {"engine": "torch"},
        {"objective": "throughput", "tokens_per_s": 5.0},
    ):
        with pytest.raises(Refused, match="is no language model"):
            checked(msgspec.structs.replace(DeployRequest(model=str(model)), **changes))
