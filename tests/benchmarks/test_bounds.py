"""What the benchmarks make of the moments of tokens and of the stages' counters, on answers that are made up."""

from __future__ import annotations

from math import isnan

import pytest

from benchmarks.parts import load, matrix, requests
from benchmarks.parts.matrix import Way

HIDDEN_BYTES = 1152 + 64


def stream(first_s: float, gap_s: float, tokens: int, asked_s: float = 0.0) -> load.Stream:
    moments = [first_s + gap_s * number for number in range(tokens)]
    return load.Stream(asked_s=asked_s, tokens_s=moments, end={"prompt_tokens": 128})


def counters(rows: int, steps: int, row_s: float, chunks: int, chunk_s: float) -> dict[str, float]:
    return {
        "decode_rows": rows,
        "decode_steps": steps,
        "decode_busy_s": rows * row_s,
        "prefill_steps": chunks,
        "prefill_busy_s": chunks * chunk_s,
        "decode_sent_bytes": rows * HIDDEN_BYTES,
        "resident_bytes": 100e6,
    }


NOTHING = counters(0, 0, 0.0, 0, 0.0)
PLAN = {"stages": [{"hop_bytes": HIDDEN_BYTES}, {"hop_bytes": HIDDEN_BYTES}]}
WAY = Way("made up", 0.005, None)


def test_moments_that_all_share() -> None:
    early, late = stream(0.0, 0.1, 11), stream(0.55, 0.1, 11)
    assert load.shared([early, late]) == (0.55, 1.0)
    assert load.shared_tokens([early, late]) == 5 + 4
    assert load.steady_rate([early, late]) == pytest.approx(9 / 0.45)
    assert isnan(load.steady_rate([early, stream(5.0, 0.1, 3)])), "they share nothing"
    assert load.rate_within(early, 0.15, 0.85) == pytest.approx(10.0)
    assert isnan(load.rate_within(early, 0.11, 0.19))


def test_one_stream_without_any_loss_has_efficiency_one() -> None:
    """Two stages of 10 ms and two hops of 5 ms; two chunks of 40 ms each at both stages."""
    after = {0: counters(63, 63, 0.01, 2, 0.04), 1: counters(63, 63, 0.01, 2, 0.04)}
    first_s = 0.04 + 0.005 + 2 * 0.04 + 0.005
    cell = matrix.cell(WAY, PLAN, 128, [stream(first_s, 0.03, 64)], {0: NOTHING, 1: NOTHING}, after)
    assert not cell.whole
    for name in ("rate", "last first", "p50", "p99", "bytes"):
        assert cell.efficiency(name) == pytest.approx(1.0), name
    assert cell.figures["bytes"] == 2 * HIDDEN_BYTES


def test_several_requests_are_held_against_the_busiest_stage() -> None:
    """The second stage needs 10 ms for a row, so two requests can have 100 tokens/s; they have 80."""
    after = {0: counters(126, 63, 0.004, 4, 0.01), 1: counters(126, 63, 0.01, 4, 0.01)}
    streams = [stream(0.1, 0.025, 64), stream(0.11, 0.025, 64)]
    cell = matrix.cell(WAY, PLAN, 128, streams, {0: NOTHING, 1: NOTHING}, after)
    assert cell.figures["rate"] == pytest.approx(80, rel=0.05)
    assert cell.bounds["rate"] == pytest.approx(100)
    assert requests.stage_rate({0: NOTHING, 1: NOTHING}, after) == pytest.approx(100)


def test_requests_that_share_no_moment_are_measured_over_the_whole_time() -> None:
    after = {0: counters(126, 126, 0.01, 4, 0.25), 1: counters(126, 126, 0.005, 4, 0.1)}
    streams = [stream(0.5, 0.01, 64), stream(2.0, 0.01, 64)]
    cell = matrix.cell(WAY, PLAN, 128, streams, {0: NOTHING, 1: NOTHING}, after)
    assert cell.whole and "*" in matrix.line(cell)
    assert cell.figures["rate"] == pytest.approx(128 / 2.63)
    assert cell.bounds["rate"] == pytest.approx(128 / (126 * 0.01 + 4 * 0.25))


def test_a_row_has_a_place_under_each_heading() -> None:
    after = {0: counters(63, 63, 0.01, 2, 0.04)}
    alone = {"stages": [{"hop_bytes": HIDDEN_BYTES}]}
    cell = matrix.cell(WAY, alone, 128, [stream(0.1, 0.01, 64)], {0: NOTHING}, after)
    assert len(matrix.line(cell)) == len(matrix.heading())
    assert isnan(cell.bounds["bytes"]), "one board sends nothing to itself"
