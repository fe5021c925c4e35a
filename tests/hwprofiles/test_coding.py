"""What codecs take on a board: measured at one width and two numbers of rows, reckoned for others."""

from __future__ import annotations

import msgspec
import pytest

from agent.workers.codings import ROWS, WIDTH, time_codings
from hwprofiles.coding import RULE, coding_s
from hwprofiles.profile import MAX_PROFILE_BYTES, Absent, compact
from hwprofiles.report import markdown
from hwprofiles.report.verdict import in_all, run_because, sections
from tests.hwprofiles import examples
from tests.hwprofiles.examples import samples
from wire.codecs import AS_IS, ELEMENT_BYTES, codecs_for


def test_every_codec_that_a_model_can_have_is_timed() -> None:
    found = time_codings()
    wanted = {(codec, dtype, rows) for dtype in ELEMENT_BYTES for codec in codecs_for(dtype, WIDTH) for rows in ROWS}
    assert {(one.codec, one.wire_dtype, one.rows) for one in found.timings} == {
        one for one in wanted if one[0] != AS_IS
    }
    assert all(0 < value < 1 for one in found.timings for value in one.samples.samples_s)


def test_time_grows_with_the_numbers_turned() -> None:
    found = examples.codings(row_s=2e-5, more_s=1e-7)
    assert coding_s(found, "int8-group", "f16", 1, 1000) == pytest.approx(2e-5, rel=1e-3)
    assert coding_s(found, "int8-group", "f16", 64, 1000) == pytest.approx(2e-5 + 63e3 * 1e-7, rel=1e-3)
    assert coding_s(found, "int8-group", "f16", 10, 2000) == pytest.approx(2e-5 + 19e3 * 1e-7, rel=1e-2)
    assert coding_s(found, "int8-group", "f16", 1, 500) == 0.0, "never below nothing"


def test_what_was_not_timed_well_is_not_known() -> None:
    found = examples.codings()
    spoiled = msgspec.structs.replace(found.timings[0], samples=samples(1e-5, valid=False, invalid_because="too few"))
    assert coding_s(examples.codings(timings=(spoiled, *found.timings[1:])), "int8-group", "f16", 1, 1000) is None
    assert coding_s(found, "int8-group", "bf16", 1, 1000) is None
    assert coding_s(found, "f16", "f32", 1, 1000) is None


def test_reports_show_it_and_judge_it() -> None:
    profile = examples.profile(codings=examples.codings())
    text = markdown(profile)
    assert "Codecs: to code and decode rows of 1000" in text and "f16 as int8-group, 64 rows" in text
    [section] = [one for one in sections(profile) if one.name == "codecs"]
    assert section.verdict == "VALID" and len(section.figures) == 4
    assert "codecs" not in {one.name for one in sections(examples.profile())}, (
        "of profiles that had none nothing is said"
    )
    absent = examples.profile(codings=Absent("asked for nothing"))
    assert "asked for nothing" in markdown(absent) and "Codecs" not in markdown(examples.profile())


def test_coding_need_not_be_known_closely() -> None:
    wide = samples(1e-5, count=8, spread=0.5)
    assert run_because(wide, RULE) == () and run_because(wide) != ()


def test_a_profile_with_all_of_it_stays_small() -> None:
    timings = examples.codings().timings
    many = examples.codings(timings=tuple(
        msgspec.structs.replace(timings[0], samples=samples(1e-5, count=2048)) for _ in range(64)
    ))  # fmt: skip
    kept = compact(examples.profile(codings=many))
    assert len(msgspec.json.encode(kept)) < MAX_PROFILE_BYTES
    assert in_all(kept, sections(kept))
