"""Whether what a device is told to run makes sense in itself. Pure; nothing is believed because of who sent it."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from agent.converge import key_of
from wire import topics
from wire.client import parse_url
from wire.codecs import is_codec_for
from wire.errors import UsageError
from wire.limits import LEAST_SUSTAINED_S, MAX_CONTROL_BYTES, MOST_SUSTAINED_S
from wire.messages import Command, Count, Desired, Role, StageOrder

MAX_WAYS: Final = 64
"""Brokers in one command: a board has at most so many neighbours."""


SUSTAINED_BOUNDS: Final = f"'seconds' of load must be {LEAST_SUSTAINED_S:g} to {MOST_SUSTAINED_S:g}"
SUSTAINED_STAGES: Final = "stages run on this board, and a sustained load would take the processor from them: stop them"


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


def is_broker(url: str) -> bool:
    """Whether this is the address of a broker."""
    try:
        parse_url(url)
    except UsageError:
        return False
    return True


def brokers_in(command: Command) -> tuple[str, ...]:
    """The addresses of brokers that a command names, if they are such and not too many."""
    given = command.arguments.get("brokers")
    urls = [url for url in given if isinstance(url, str) and is_broker(url)] if isinstance(given, list) else []
    return tuple(urls) if len(urls) <= MAX_WAYS and isinstance(given, list) and len(urls) == len(given) else ()


def sustained_s_in(verb: str, command: Command) -> float:
    """For how long a command puts the board under load; 0 for other commands, and where that is too short or long."""
    given = command.arguments.get("seconds")
    if verb != "sustain" or isinstance(given, bool) or not isinstance(given, (int, float)):
        return 0.0
    return float(given) if LEAST_SUSTAINED_S <= given <= MOST_SUSTAINED_S else 0.0


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
            if address.broker and not is_broker(address.broker):
                return f"{what}: {address.broker!r} is no address of a broker"
        for codec in (order.codec_in, order.codec_out, order.row_codec_in, order.row_codec_out):
            if not is_codec_for(codec, order.wire_dtype, order.hidden):
                return f"{what}: no codec {codec} for {order.wire_dtype} rows of {order.hidden}"
        if (order.runs == "rounds") != (order.training is not None):
            return f"{what}: rounds and what to do in them belong together"
        if order.training is not None and not _fits_its_role(order, order.training.role):
            return f"{what}: blocks {order.first_block} to {order.end_block} are no {order.training.role}"
        if order.training is not None and (order.training.role == "shard") != (order.training.share is not None):
            return f"{what}: a shard and its share belong together"
        if order.end_block < order.first_block:
            return f"{what}: blocks {order.first_block} to {order.end_block}"
    return ""


def _fits_its_role(order: StageOrder, role: Role) -> bool:
    if role not in ("whole", "ends"):
        return not order.embedding and not order.head and order.end_block > order.first_block
    return order.embedding and order.head and order.first_block == 0 and (role == "whole" or order.end_block == 0)
