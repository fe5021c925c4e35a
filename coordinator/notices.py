"""ONE table of notices: what the coordinator tells people, how urgent it is, and what to try.

A notice is pure data; who publishes it adds sender and time (wire.messages.Event). Texts are templates, their fields
are given to `notice`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from wire.ids import site_option

Level = Literal["info", "warning", "error"]


class Row(NamedTuple):
    """A kind of notice; `text` and `try_` are templates over the same fields."""

    code: str
    level: Level
    text: str
    try_: str = ""


class Notice(Struct, frozen=True, kw_only=True):
    """Something a person may want to know. `device` is '' when it is about none in particular."""

    code: str
    level: Level
    text: str
    try_: str = ""
    device: str = ""


_ROWS: Final = (
    Row("device-online", "info", "{device} is online ({host})"),
    Row("device-restarted", "info", "{device} was restarted: {old} gave way to {new}"),
    Row("device-left", "info", "{device} left{reason}"),
    Row("device-suspect", "warning", "no heartbeat from {device} for {silent_s:.1f} s", "wait, or look at its link"),
    Row("device-back", "info", "{device} is heard again"),
    Row(
        "device-silent",
        "warning",
        "{device} is offline: no heartbeat for {silent_s:.1f} s",
        "is {device} powered and on the network? ping {host}; systemctl status edgelam-agent on it",
    ),
    Row(
        "device-unanswering",
        "warning",
        "{device} is left out until its next heartbeat: a stage on it does not answer",
        "if it happens again: edgelam top; is {device} too slow, or its link too bad, for what it was given?",
    ),
    Row(
        "device-stale",
        "info",
        "the broker remembers {device}, but it sends no heartbeat",
        "start edgelam-agent on {device} if it should take part",
    ),
    Row(
        "device-not-joining",
        "warning",
        "{device} is visible over mDNS at {host}, but has not come to the broker for {waited_s:.0f} s",
        "on {device}: can it reach the broker's port, is its site key right? edgelam-agent run --log-level debug",
    ),
    Row(
        "identity-twice",
        "error",
        "two agents use the name {device}: {host} and {other_host}",
        "give one of them another name: edgelam-agent run --name NAME",
    ),
    Row(
        "fleet-full",
        "error",
        "{device} was not admitted: {limit} devices are known, and none of them is offline",
        "split the boards over two sites",
    ),
    Row(
        "device-slow",
        "warning",
        "{device} is slower than it measured: it {what}{heat}",
        "is it hot, or does another program use it? if it stays so: edgelam bench {device} --again",
    ),
    Row(
        "profile-doubted",
        "warning",
        "the profile of {device} is not believed: it {what}; plans reckon with what was seen",
        "edgelam bench {device} --again; nothing else may run on it meanwhile",
    ),
    Row("profile-kept", "info", "the profile of {device} is believed again: it keeps what that says after all"),
    Row("profile-anew", "info", "{device} has measured itself anew, and is believed again"),
    Row("device-as-measured", "info", "{device} is as fast as it measured again"),
    Row("device-faster", "info", "{device} is less slow than it was: it {what}"),
    Row(
        "device-forgiven",
        "info",
        "{device} is planned with as it measured: it was not seen to be slow for {waited_s:.0f} s",
    ),
    Row(
        "link-slow",
        "warning",
        "the link of {device} is slower than it measured: it {what}",
        "does something else use the air or the cable? if it stays so: edgelam bench {device} --again",
    ),
    Row("link-faster", "info", "the link of {device} is less slow than it was: it {what}"),
    Row("link-as-measured", "info", "the link of {device} is as fast as it measured again"),
    Row("link-forgiven", "info", "the link of {device} is planned with as it measured: it was not used for a while"),
    Row(
        "way-slow",
        "warning",
        "messages between {what} take {more_ms:.1f} ms longer than before, although their own links are well",
        "look at what lies between these boards: a switch, an access point",
    ),
    Row(
        "engine-fell-back",
        "warning",
        "{device} runs {what} on {engine}, not on the engine that was planned: {because}",
        "edgelam-agent info --prove on {device}; what each engine needs: docs/engines.md",
    ),
    Row("deployment-moved", "info", "{name} moves to {boards} (epoch {epoch}): {because}"),
    Row("deployment-stays", "info", "{name} stays where it is although {because}"),
    Row("broker-lost", "warning", "the broker at {url} is gone ({reason})", "wait: reconnecting"),
    Row("broker-ended", "warning", "{what}", "nothing: all retained state is published again"),
    Row("bad-message", "warning", "{reason}", "check that all boards run the same edgelam version"),
    Row("copy-took-over", "info", "{what}"),
    Row(
        "copies-missing",
        "warning",
        "{what}: {reason}",
        "one more board, more memory for the agents, or fewer --replicas; until then a loss may cost a download",
    ),
)

TABLE: Final[Mapping[str, Row]] = {row.code: row for row in _ROWS}


def boards_hint(site: str) -> str:
    """How a site gets boards."""
    option = site_option(site)
    return f"edgelam-agent run{option} on each board, or: edgelam testbed up{option} --boards 4"


def notice(code: str, *, device: str = "", **fields: object) -> Notice:
    """Fill a row of the table; KeyError for a code or field that isn't there is a defect of the caller."""
    row = TABLE[code]
    text, try_ = (template.format(device=device, **fields) for template in (row.text, row.try_))
    return Notice(code=code, level=row.level, text=text, try_=try_, device=device)
