"""What codecs cost a model: measured layer by layer, and the same as through whole stages."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from models import judge as judge_module
from models.codecs import Text, load_report, report_path, save_report, text_in, usual_text
from models.judge import LEAST_TOKENS, judge, trials_for
from tests.models.stages import Ring, packed_tiny
from wire.codecs import codecs_for
from wire.coding import coder
from wire.errors import Refused, UsageError

TEXT = Text("made-up words", "", "sha256:0")
TOKENS = LEAST_TOKENS


def ids(count: int = TOKENS) -> list[int]:
    return np.random.default_rng(5).integers(0, 320, count).tolist()


@pytest.mark.parametrize(("precision", "wire"), [("int4", "f16"), ("f32", "f32"), ("f32", "bf16")])
def test_every_codec_is_measured_at_single_cuts_at_some_together_and_at_all(
    tmp_path: Path, precision: str, wire: str
) -> None:
    packed = packed_tiny(tmp_path, precision=precision, wire=wire)
    said: list[str] = []
    report = judge(packed, ids(), TEXT, 1, 60.0, said.append)
    wanted = codecs_for(wire, 64)[1:]
    assert {cost.codec for cost in report.costs} == set(wanted) == {took.codec for took in report.times}
    for codec in wanted:
        cuts = {cost.cuts for cost in report.costs if cost.codec == codec}
        assert cuts == {(0,), (1,), (2,), (3,), (4,), (1, 3), (1, 2, 3), (0, 1, 2, 3, 4)}
    assert report.tokens == TOKENS and report.perplexity > 1
    assert all(0 < took.row_s < 0.1 and 0 < took.chunk_row_s < 0.1 for took in report.times)
    assert all(0 <= cost.agreement <= 1 and cost.nats_error > 0 for cost in report.costs)
    coarse = {cost.codec: cost.logit_error for cost in report.costs if len(cost.cuts) == 5}
    assert coarse["int8-token"] > coarse["int8-group"] > 0
    if wire == "f32":
        assert coarse["f16"] < coarse["bf16"]


def test_a_trial_is_what_whole_stages_with_that_codec_between_them_say(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, precision="int4")
    report = judge(packed, ids(), TEXT, 1, 60.0, lambda _text: None)
    [cost] = [cost for cost in report.costs if cost.codec == "int8-group" and cost.cuts == (2,)]
    whole = Ring.of(packed, tmp_path, (), context_tokens=256)
    cut = Ring.of(packed, tmp_path, (2,), context_tokens=256)
    crossing = coder("int8-group", "f16", 64)
    tokens = np.array(ids(), np.int64)
    more, same = [], []
    for end in range(2, TOKENS):  # the head says the last row only: the prompt is given anew, one row longer each time
        plain = whole.step(tokens[:end], 0).astype(np.float64)
        given = cut.stages[0].step(cut.slots[0], tokens[:end], 0)
        coded = cut.stages[1].step(cut.slots[1], crossing.decode(crossing.encode(given)), 0).astype(np.float64)
        said = [
            np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[end]]
            for logits in (coded, plain)
        ]
        more.append(said[0] - said[1])
        same.append(plain.argmax() == coded.argmax())
    assert cost.nats == pytest.approx(np.mean(more), abs=5e-4)
    assert cost.agreement == pytest.approx(np.mean(same), abs=0.02)


def test_less_time_takes_fewer_tokens_and_too_little_is_refused(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path)
    said: list[str] = []
    all_of_it = judge(packed, ids(4096), TEXT, 1, 1000.0, said.append)
    assert all_of_it.tokens == 4096 and not any("are taken" in text for text in said)
    with pytest.raises(Refused, match=f"{LEAST_TOKENS} tokens would last"):
        judge(packed, ids(), TEXT, 1, 1e-6, said.append)
    with pytest.raises(UsageError, match="255 tokens"):
        judge(packed, ids(LEAST_TOKENS - 1), TEXT, 1, 60.0, said.append)


def test_a_large_model_gets_fewer_tokens_rather_than_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_tiny(tmp_path)
    trials = len(trials_for(codecs_for("f32", 64)[1:], 4))
    monkeypatch.setattr(judge_module, "MOST_BYTES", 300 * (trials + 1) * 64 * 4)
    said: list[str] = []
    assert judge(packed, ids(1000), TEXT, 1, 60.0, said.append).tokens == 300
    assert "300 of 1000 tokens are taken" in said[0]


def test_a_report_is_found_again_beside_its_pack_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, precision="int4")
    assert load_report(packed) is None
    report = judge(packed, ids(), TEXT, 1, 60.0, lambda _text: None)
    path = save_report(packed, report)
    assert path == report_path(packed) and path.parent == next(iter(packed.files.values())).parent
    assert load_report(packed) == report
    assert load_report(packed_tiny(tmp_path, precision="int8")) is None, "another precision is another pack"
    assert load_report(packed_tiny(tmp_path, precision="int4", wire="bf16")) is None
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(report, codec_version=99)))
    assert load_report(packed) is None
    path.write_bytes(path.read_bytes()[:-9])
    assert load_report(packed) is None


def test_places_for_a_cut_are_spread_over_a_deep_model_and_its_ends_are_among_them() -> None:
    trials = trials_for(["int8-group"], 30)
    singles = sorted(min(trial.cuts) for trial in trials if len(trial.cuts) == 1)
    assert singles == [0, 4, 8, 11, 15, 19, 22, 26, 30]
    assert [len(trial.cuts) for trial in trials if len(trial.cuts) > 1] == [2, 3, 4, 31]
    assert len({trial.cuts for trial in trials}) == len(trials)


def test_there_is_a_text_on_every_python_and_a_file_is_taken_instead(tmp_path: Path) -> None:
    usual = usual_text()
    assert "Objects, values and types" in usual.words and len(usual.words) > 20_000
    assert usual == usual_text()
    own = tmp_path / "own.txt"
    own.write_text("Grüße", encoding="utf-8")
    assert text_in(own).name == "own.txt" and text_in(own).words == "Grüße"
    own.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        text_in(own)
    with pytest.raises(UsageError, match="can't read"):
        text_in(tmp_path / "none.txt")
