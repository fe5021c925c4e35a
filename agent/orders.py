"""Whether what a device is told to run makes sense in itself. Pure; nothing is believed because of who sent it."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from agent.converge import key_of
from wire import topics
from wire.limits import MAX_CONTROL_BYTES
from wire.messages import Count, Desired


class Refusal(Struct, frozen=True):
    """An order that is not taken: its epoch, and why in words for its writer."""

    epoch: int
    because: str


class _Epoch(Struct):
    epoch: Count


def epoch_of(payload: bytes | memoryview) -> int:
    """The epoch in an order that is wrong otherwise; 0 if it can't be told. Lets its writer know which one it was."""
    if len(payload) > MAX_CONTROL_BYTES:
        return 0
    try:
        return msgspec.json.decode(payload, type=_Epoch).epoch
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return 0


def is_inbox(topic: str, site: str) -> bool:
    """Whether `topic` is an inbox of this site and nothing else: a request can't make us publish elsewhere."""
    fields = topics.INBOX.fields_of(topic)
    if fields is None or any(not level or "+" in level or "#" in level for level in fields):
        return False
    return topic == topics.INBOX.on(site, *fields)


def problem_with(desired: Desired, site: str, device: str) -> str:
    """Say what is wrong with an order, in words for its writer; '' if nothing is."""
    if desired.device != device:
        return f"is for device {desired.device}, this is {device}"
    seen = set()
    for order in desired.stages:
        what = f"stage {order.stage} of {order.deployment}"
        if key_of(order) in seen:
            return f"{what} is listed twice"
        seen.add(key_of(order))
        if order.stage >= order.stages:
            return f"{what}: there are {order.stages}"
        if order.epoch > desired.epoch:
            return f"{what}: epoch {order.epoch} is beyond {desired.epoch}"
        for address in (order.inbox, order.next):
            if not is_inbox(address.topic, site):
                return f"{what}: {address.topic!r} is no inbox of site {site}"
        if order.end_block < order.first_block:
            return f"{what}: blocks {order.first_block} to {order.end_block}"
    return ""
