"""How frames look to whoever taps the wire."""

from __future__ import annotations

import numpy as np

from coordinator.screens.wiretap import describe, row
from wire.drafts import drafts_meta
from wire.frames import FLAG_DRAFTS, Kind, Parcel, Tensor, encode
from wire.rows import RowOf, rows_meta
from wire.transport import Inbound

TOPIC = "edgelam/v1/lab/act/chat/1/in"


def tapped(parcel: Parcel) -> Inbound:
    [frame] = encode(parcel, 1, 0, 0)
    return Inbound(TOPIC, b"".join(frame), False)


def test_rows_of_several_requests_are_shown_with_their_owners() -> None:
    owners = [RowOf((0xAB000000 + number) << 32, 70 + number) for number in range(10)]
    hidden = Tensor.of(np.zeros((10, 4), np.float16))
    message = tapped(Parcel(Kind.ROWS, 3, 0, 0, 0, hidden, rows_meta(owners)))
    shown = describe(message)
    assert "ROWS F16[10x4] requests ab000000 at 70, ab000001 at 71, " in shown
    assert shown.endswith("ab000007 at 77 and 2 more epoch 3")
    assert row(message)["frame"]["rows"][9] == {"request": "ab00000900000000", "position": 79}


def test_rows_that_contradict_themselves_are_unreadable() -> None:
    hidden = Tensor.of(np.zeros((2, 4), np.float16))
    message = tapped(Parcel(Kind.ROWS, 3, 0, 0, 0, hidden, rows_meta([RowOf(1, 2)])))
    assert "1 rows are named" in describe(message)


def test_a_row_of_one_request_is_shown_as_ever() -> None:
    hidden = Tensor.of(np.zeros((1, 4), np.float16))
    shown = describe(tapped(Parcel(Kind.HIDDEN, 3, 7 << 32, 41, 0, hidden)))
    assert shown.endswith("HIDDEN F16[1x4] position 41 request 00000007 epoch 3")


def test_guesses_are_shown_behind_the_row_that_they_follow() -> None:
    hidden = Tensor.of(np.zeros((3, 4), np.float16))
    message = tapped(Parcel(Kind.HIDDEN, 3, 7 << 32, 41, FLAG_DRAFTS, hidden, drafts_meta([70, 9])))
    assert describe(message).endswith("HIDDEN F16[3x4] position 41 request 00000007 epoch 3 guessed 70, 9")
    assert row(message)["frame"]["drafts"] == [70, 9]


def test_guesses_that_do_not_fit_their_rows_are_unreadable() -> None:
    hidden = Tensor.of(np.zeros((2, 4), np.float16))
    assert "2 guesses" in describe(tapped(Parcel(Kind.HIDDEN, 3, 7, 41, FLAG_DRAFTS, hidden, drafts_meta([70, 9]))))
