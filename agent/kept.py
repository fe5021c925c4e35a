"""The device's profile: remembered from the last run, joined with what jobs find, kept in the state folder, and given
up when it no longer fits the device (software, limits, emulation, power mode, age)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from agent import engines
from agent.jobs import NOTHING, Job, Subject
from agent.joining import Found, joined
from agent.pairs import with_pair
from hwprofiles import profile
from hwprofiles.profile import PairMeasurement, Profile, Snapshot
from hwprofiles.survey import Survey
from wire.errors import EdgelamError
from wire.messages import EngineName, KitModule

LOG = logging.getLogger("edgelam.measuring")

LOOK_PERIOD_S: Final = 60.0
"""Between two looks whether the profile still holds; one takes some hundredths of a second."""

EXPIRED_PAUSE_S: Final = 600.0
"""From giving a profile up until the next look: a governor that comes and goes must not have us measure for ever."""


class Kept:
    """`survey()` and `snapshot()` read the device afresh."""

    def __init__(self, subject: Subject, survey: Callable[[], Survey], snapshot: Callable[[], Snapshot]) -> None:
        self._subject = subject
        self._survey = survey
        self._snapshot = snapshot
        self._next_look_s = 0.0
        self._seen_expired = ""
        self.profile: Profile | None = self._remembered()

    def _remembered(self) -> Profile | None:
        try:
            known = profile.load(self._subject.profile_path)
        except EdgelamError as error:
            if self._subject.profile_path.exists():
                LOG.warning("%s", error)
            return None
        except OSError as error:
            LOG.warning("%s: %s", self._subject.profile_path, error)
            return None
        because = self._why_expired(known)
        if because:
            LOG.info("the kept profile no longer holds: %s", because)
            return None
        return known

    def _why_expired(self, known: Profile) -> str:
        survey = self._survey()
        because = profile.expired(
            known, time.time(), self._snapshot(), survey.memory, self._subject.emulation, survey.identity
        )
        if not because and any(module.threads != self._subject.threads for module in known.modules):
            because = f"threads changed to {self._subject.threads}"
        return because

    def gave_up(self, now_s: float) -> bool:
        """Look whether the profile still holds; whether it was just given up.

        Boards change while the agent runs: another power mode or governor, or a month goes by. What was seen twice in
        a row is believed, and all is measured anew; until then the old profile stands where it was published."""
        if self.profile is None or now_s < self._next_look_s:
            return False
        because = self._why_expired(self.profile)
        self._next_look_s = now_s + LOOK_PERIOD_S
        if not because or because != self._seen_expired:
            self._seen_expired = because
            return False
        LOG.warning("the profile no longer holds: %s", because)
        self.profile, self._seen_expired = None, ""
        self._next_look_s = now_s + EXPIRED_PAUSE_S
        return True

    def take(
        self,
        job: Job,
        kit: Sequence[KitModule],
        others: Sequence[EngineName],
        engines_failed: Mapping[str, str],
        part: bool = False,
    ) -> None:
        """Join what was found with what is known of other modules; save. Raises EdgelamError, OSError.

        `others`: engines that are measured after the processor. `part`: the job goes on; what it has not come to yet
        is as it was.
        """
        now = self._snapshot()
        found = Found(
            result=job.result or msgspec.structs.replace(NOTHING, modules=tuple(job.parts)),
            failed={} if part else job.failed,
            link_asked=job.link and not part,
            board_asked=job.board and job.result is not None,
            sustained_asked=job.sustained_s > 0,
            anew=bool(job.asked),
            engines_failed=engines_failed,
            disturbed=job.disturbed,
            before=job.before or now,
            now=now,
        )
        in_kit = {module.key for module in kit}
        made = joined(self.profile, found, self._survey(), self._subject.emulation, in_kit)
        left = engines.due(others, engines_failed, kit, made)
        made = msgspec.structs.replace(made, pending=left.engine if left else "")
        pair = found.result.pair
        if isinstance(pair, PairMeasurement):
            # A pair is no reason to call the other figures fresh.
            made = msgspec.structs.replace(self.profile or made, pairs=with_pair(made.pairs, pair))
        self.profile = profile.compact(made)
        profile.save(self.profile, self._subject.profile_path)

    def nothing_pending(self) -> None:
        """No engine is still to be measured, whatever was said before. Raises OSError."""
        if self.profile is not None:
            self.profile = msgspec.structs.replace(self.profile, pending="")
            profile.save(self.profile, self._subject.profile_path)
