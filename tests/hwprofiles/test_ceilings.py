"""What memory gives, and what modules make of it: counted right, bounded, and never guessed."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from hwprofiles import ceilings
from hwprofiles.probe.caches import last_cache_bytes
from hwprofiles.profile import ModuleMeasurement, Profile, compact
from hwprofiles.reading import Absent, Reading
from hwprofiles.report.ceiling_rows import roofline, tables
from hwprofiles.report.plots import NoPlot, Plot, svg
from hwprofiles.report.verdict import sections
from hwprofiles.samples import Rate
from tests.hwprofiles import examples

MB = 1 << 20


def weighed(**changes: object) -> ModuleMeasurement:
    """A block of 6.25 MB of weights whose steps take (1 ms + 1 ms) at depth 1 and (1 + 6) at depth 6."""
    timings = tuple(
        examples.timing(0.001 + stack * 0.001 * factor, phase, tokens, context, stack)
        for stack in (1, 6)
        for phase, tokens, context, factor in (("decode", 1, 16, 1), ("decode", 1, 256, 2), ("prefill", 32, 16, 4))
    )
    made = msgspec.structs.replace(
        examples.module("block", *timings), weight_bytes=6_250_000, row_operations=20_000_000
    )
    return msgspec.structs.replace(made, **changes)


def board(**changes: object) -> Profile:
    fields: dict[str, object] = {"modules": (weighed(),), "ceilings": examples.ceilings(), "disk": examples.disk()}
    return examples.profile(**{**fields, **changes})


def test_passes_move_once_twice_and_three_times_their_array() -> None:
    rates = ceilings.memory_rates(3 * MB, 2, 0.02)
    assert [(rate.what, rate.amount) for rate in rates] == [("read", 3 * MB), ("copy", 6 * MB), ("add", 9 * MB)]
    assert all(len(rate.samples.samples_s) >= 6 and min(rate.samples.samples_s) > 0 for rate in rates)


def test_an_array_is_twice_the_last_cache_or_sixteen_megabytes() -> None:
    assert ceilings.array_bytes(0, 4096 * MB) == 16 * MB
    assert ceilings.array_bytes(32 * MB, 4096 * MB) == 64 * MB


def test_arrays_that_would_fill_the_memory_are_not_made() -> None:
    refused = ceilings.array_bytes(32 * MB, 512 * MB)
    assert isinstance(refused, Absent) and "64.0 MB need more than a quarter of 512.0 MB" in refused.because
    assert ceilings.array_bytes(1 * MB, 192 * MB) == 16 * MB


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({"index0": "64K", "index3": "2048K"}, 2 * MB), ({"index2": "1M"}, MB), ({"index0": "x"}, 0)],
)
def test_the_last_cache_is_the_largest_that_the_kernel_lists(
    tmp_path: Path, sizes: dict[str, str], expected: int
) -> None:
    for name, size in sizes.items():
        folder = tmp_path / "sys/devices/system/cpu/cpu0/cache" / name
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    found = last_cache_bytes(tmp_path)
    assert found.value == expected if isinstance(found, Reading) else expected == 0


def test_a_rate_is_the_amount_over_the_median_and_has_the_interval_of_it() -> None:
    rate = Rate(what="read", amount=10, samples=examples.samples(0.5, spread=0.0))
    assert ceilings.per_second(rate) == pytest.approx(20) and ceilings.interval_per_second(rate) == (20.0, 20.0)
    empty = msgspec.structs.replace(rate, samples=msgspec.structs.replace(rate.samples, samples_s=()))
    assert ceilings.per_second(empty) is None and ceilings.interval_per_second(empty) is None
    assert ceilings.best(()) is None


def test_decode_is_set_beside_memory_and_prefill_beside_products() -> None:
    decode, prefill = ceilings.achieved(weighed(), examples.ceilings())
    assert (decode.phase, decode.context) == ("decode", 16), "the shortest context"
    assert math.isclose(decode.bytes_per_s, 6.25e9, rel_tol=0.01)
    assert math.isclose(decode.memory_share or 0, 0.625, rel_tol=0.01)
    assert math.isclose(prefill.operations_per_s, 32 * 20e6 / 0.004, rel_tol=0.01)
    assert math.isclose(prefill.product_share or 0, 160e9 / 80e9, rel_tol=0.01)
    assert math.isclose(decode.intensity, 3.2, rel_tol=0.01)


def test_a_head_runs_the_last_row_of_a_prompt_alone_unless_it_is_an_item_model_s() -> None:
    assert [one.phase for one in ceilings.achieved(weighed(kind="head"), examples.ceilings())] == ["decode"]
    of_items = tuple(timing for timing in weighed().timings if timing.phase == "prefill")
    found = ceilings.achieved(weighed(kind="head", timings=of_items), examples.ceilings())
    assert [one.phase for one in found] == ["prefill"]


@pytest.mark.parametrize("changes", [{"weight_bytes": 0}, {"row_operations": 0}, {"kind": "embedding"}])
def test_what_is_not_known_of_a_module_is_not_made_up(changes: dict[str, object]) -> None:
    assert ceilings.achieved(weighed(**changes), examples.ceilings()) == ()


def test_blocks_say_how_fast_a_board_multiplies_where_nothing_else_does() -> None:
    assert math.isclose(ceilings.best_of_blocks([weighed(kind="head"), weighed()]) or 0, 160e9, rel_tol=0.01)
    assert ceilings.best_of_blocks([weighed(kind="head"), weighed(row_operations=0)]) is None


def test_the_report_says_what_decode_reaches_of_the_memory() -> None:
    shown = tables(board())
    assert [table.title.partition(",")[0].partition(":")[0] for table in shown] == [
        "Ceilings", "What modules make of the ceilings", "Disk",
    ]  # fmt: skip
    assert shown[0].rows[0][:2] == ("memory: read", "10.00 GB/s")
    assert shown[1].rows[0][1:4] == ("decode 1", "6.25 GB/s", "62%")
    assert shown[2].rows[0][1] == "20.0 MB/s" and shown[2].rows[1][4] == "VALID"


def test_the_roofline_has_roofs_and_the_modules_under_them() -> None:
    plot = roofline(board())
    assert isinstance(plot, Plot)
    roofs, dots = plot.series[:2], plot.series[2:]
    assert [max(point.y for point in roof.points) for roof in roofs] == pytest.approx([40, 80])
    assert [len(one.points) for one in dots] == [2] and dots[0].name.endswith("1, 32 tokens")
    assert "62%" in plot.alt or "63%" in plot.alt or "200%" in plot.alt
    assert svg(plot, "x").count("<circle") + svg(plot, "x").count('class="hollow"') >= 2


def test_without_ceilings_there_is_no_roofline_and_the_reason_stands_there() -> None:
    plot = roofline(examples.profile(ceilings=Absent("emulated")))
    assert isinstance(plot, NoPlot) and plot.because == "emulated"
    nowhere = roofline(board(modules=()))
    assert isinstance(nowhere, NoPlot) and "no module" in nowhere.because


def test_ceilings_and_disk_are_judged_like_every_other_run() -> None:
    found = {section.name: section for section in sections(board())}
    assert (found["ceilings"].verdict, found["disk"].verdict) == ("VALID", "VALID")
    few = msgspec.structs.replace(examples.ceilings().memory[0], samples=examples.samples(0.001, count=4))
    spoilt = {
        section.name: section
        for section in sections(board(ceilings=examples.ceilings(memory=(few,)), disk=Absent("in memory")))
    }
    assert spoilt["ceilings"].verdict == "INVALID" and "4 samples" in spoilt["ceilings"].because[0]
    assert spoilt["disk"].verdict == "ABSENT" and spoilt["disk"].because == ("in memory",)


def test_a_profile_of_an_earlier_version_has_none_of_it_and_loads() -> None:
    old = msgspec.to_builtins(examples.profile())
    for name in ("ceilings", "disk", "course", "energy", "sustained"):
        del old[name]
    for module in old["modules"]:
        for name in ("weight_bytes", "row_operations", "took_s", "spoiled_because"):
            del module[name]
    found = msgspec.json.decode(msgspec.json.encode(old), type=Profile)
    assert found.ceilings == Absent("not measured") and found == examples.profile()


def test_ceilings_are_thinned_with_the_rest_of_a_profile() -> None:
    many = msgspec.structs.replace(examples.ceilings().memory[0], samples=examples.samples(0.001, count=900))
    kept = compact(board(ceilings=examples.ceilings(memory=(many,)))).ceilings
    assert len(kept.memory[0].samples.samples_s) == 200 and kept.memory[0].samples.taken == 900  # type: ignore[union-attr]
