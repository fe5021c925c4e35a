"""A requester asks how its request stands at a stage: who is silent must be known before anything is planned anew."""

from __future__ import annotations

import msgspec

from agent.orders import is_inbox
from wire.errors import PeerError
from wire.frames import Kind, Parcel
from wire.messages import Inquiry, Standing, decode


def inquiry_of(parcel: Parcel, site: str) -> Inquiry:
    """Read an inquiry; raise PeerError if it is none, or if its answer would go to no inbox of this site."""
    inquiry = decode(parcel.meta, Inquiry, "inquiry")
    if not is_inbox(inquiry.reply.topic, site) or inquiry.reply.broker:
        raise PeerError(f"{inquiry.reply.topic!r} is not an inbox of this site")
    return inquiry


def standing_parcel(parcel: Parcel, standing: Standing) -> Parcel:
    """The answer to an inquiry, in the epoch in which it was asked."""
    return Parcel(Kind.STANDING, parcel.epoch, parcel.request, meta=msgspec.json.encode(standing))
