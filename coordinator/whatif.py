"""`edgelam plan --with`: profiles in files read and checked, and a plan made of them in this process.

The plan never comes near a coordinator: one is only asked for the boards that it has. So nothing of it can be put in
force, and nothing of a file reaches a board.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from coordinator.asked import check_measured, checked
from coordinator.client import Client
from coordinator.deployments import deployment_name
from coordinator.journal import DeployRequest
from coordinator.planning.absent import (
    MAX_BOARDS,
    AbsentBoard,
    AssumedLink,
    absent_boards,
    absent_text,
    check_age,
)
from coordinator.planning.copied import planned_with_copies
from coordinator.planning.cost import link_cost
from coordinator.planning.explain import explain
from coordinator.planning.partition import Infeasible
from coordinator.planning.plan import Plan
from coordinator.planning.planner import Candidate
from coordinator.planning.request import check
from coordinator.planning.topology import hops_of
from coordinator.preparing import coded, plan_request
from coordinator.shelf import Shelf
from hwprofiles.profile import Profile
from hwprofiles.report import document
from models.cache import cache_dir
from wire.errors import Refused, UsageError
from wire.messages import InboxAddress

COPIES: Final = re.compile(r"^(?P<path>.+)\*(?P<count>[0-9]{1,4})$")
"""'pi5.json*3' is that board three times."""

NOWHERE: Final = InboxAddress(topic="what-if")


class WhatIf(Struct, frozen=True, kw_only=True):
    """A plan with boards that are not there, and what it was made of."""

    plan: Plan
    absent: tuple[AbsentBoard, ...]
    there: tuple[str, ...]
    explanation: tuple[str, ...]

    def text_before(self) -> list[str]:
        return absent_text(self.absent, {stage.device for stage in self.plan.stages}, len(self.there))

    def document(self) -> dict[str, Any]:
        """As JSON: no edgelam.plan, so that nothing takes it for one that could be put in force."""
        return {
            "schema": "edgelam.what-if/1",
            "deployable": False,
            "absent": [
                {key: value for key, value in msgspec.to_builtins(board).items() if key != "profile"}
                for board in self.absent
            ],
            "there": list(self.there),
            "plan": msgspec.to_builtins(self.plan),
        }


def read_boards(named: Sequence[str], now_unix: float, accept_expired: bool = False) -> list[tuple[str, Profile]]:
    """(file, profile) of every board that is named: profiles, reports, folders of them, each with *N for N of it.

    Raises UsageError for what is not there, CorruptData for what can't be read, Refused for what is too old,
    or was found not to be true.
    """
    found: list[tuple[str, Profile]] = []
    for text in named:
        path, count = _path_and_count(text)
        for file in _files(path):
            report = document.load(file)
            for board in report.boards:
                if board.device in report.doubted:
                    raise Refused(
                        f"{file}: the profile of {board.device} is not believed: the board "
                        f"{report.doubted[board.device]}",
                        try_=f"edgelam bench {board.device} --again, then a new report",
                    )
                if not accept_expired:
                    check_age(board.profile, str(file), now_unix)
                found += [(str(file), board.profile)] * count
        if len(found) > MAX_BOARDS:
            raise UsageError(f"{len(found)} boards: a plan takes {MAX_BOARDS}", try_="fewer profiles")
    return found


def _path_and_count(text: str) -> tuple[Path, int]:
    match = COPIES.match(text)
    if match is None or Path(text).exists():
        return Path(text).expanduser(), 1
    count = int(match["count"])
    if not 1 <= count <= MAX_BOARDS:
        raise UsageError(f"{text}: {count} boards", try_=f"'{match['path']}*N' with N from 1 to {MAX_BOARDS}")
    return Path(match["path"]).expanduser(), count


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix == ".json" and file.is_file())
    if not files:
        raise UsageError(f"{path}: no profile in this folder", try_="edgelam bench --json -o FILE writes one")
    return files


def what_if(
    request: DeployRequest,
    profiles: Sequence[tuple[str, Profile]],
    there: Client | None,
    link: AssumedLink | None,
    progress: Callable[[str], None],
) -> WhatIf:
    """Plan for these boards, and for those of the coordinator `there` if one is given.

    The model has to be in the cache of this machine, or where it can be packed from.
    """
    request = checked(request)
    if request.topology == "direct":
        raise UsageError(
            "the ways between boards that are not there are not measured, so no plan can go directly",
            try_="--topology central",
        )
    here = _candidates(there, request, progress) if there is not None else []
    name = deployment_name(request.model)
    prepared = asyncio.run(Shelf(cache_dir()).prepare(request.model, request.precision, progress))
    wanted = plan_request(request, name)
    check(prepared.packed.graph, wanted)
    check_measured(request, prepared)
    absent = absent_boards(profiles, [board.device for board in here], link)
    candidates = [*here, *(board.candidate for board in absent)]
    _check_excluded(request, candidates)
    try:
        plan = planned_with_copies(prepared.packed.graph, candidates, wanted, request.slots, lambda _stage: NOWHERE)
    except Infeasible as error:
        raise Infeasible(error.message, try_=_advice(absent) or error.try_) from None
    plan = coded(plan, request, prepared, candidates)
    if hops_of(plan) and request.topology == "auto":
        because = f"{plan.because.rstrip('.')}. Through the site's broker: other ways can't be measured"
        plan = msgspec.structs.replace(plan, because=f"{because}.")
    return WhatIf(
        plan=plan,
        absent=tuple(absent),
        there=tuple(board.device for board in here),
        explanation=tuple(explain(plan, prepared.packed.graph, candidates)),
    )


def _advice(absent: Sequence[AbsentBoard]) -> str:
    """What to do about boards that nobody can measure from here."""
    alone = [board.device for board in absent if link_cost(board.profile)[0] is None]
    return f"assume a link for {', '.join(alone)}: --link-rate 100 --link-delay 1 (Mbit/s, ms)" if alone else ""


def _candidates(there: Client, request: DeployRequest, progress: Callable[[str], None]) -> list[Candidate]:
    """The boards of a coordinator as it would plan with them; it knows nothing of the others, so nobody is excluded."""
    asked = msgspec.structs.replace(request, excluded=(), boards_at_least=1, replicas=1)
    answer = there.last("/v1/candidates", asked, progress)
    return msgspec.convert(answer["candidates"], type=list[Candidate])


def _check_excluded(request: DeployRequest, candidates: Sequence[Candidate]) -> None:
    known = [candidate.device for candidate in candidates]
    for name in request.excluded:
        if name not in known:
            raise UsageError(f"no board {name!r} to leave out", try_=f"one of: {', '.join(known)}")
