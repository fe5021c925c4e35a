"""What factors in the last block alone, and gradients by them, are foretold to take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from coordinator.rounds.adapters import spec_of
from coordinator.rounds.bases import Base, Part
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.orders import states_bytes, task_of
from coordinator.rounds.trunks import operations_of
from models.families.bert import BertConfig
from models.training.memory import encoder_peak_bytes, ends_peak_bytes, peak_bytes, trunk_peak_bytes
from tests.models.tiny import tiny_config
from wire.messages import ArtifactRef
from wire.privacy import Privacy

CONFIG = tiny_config("llama")
BERT = BertConfig(
    model_type="bert", hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=12, vocab_size=9,
    max_position_embeddings=16,
)  # fmt: skip
ALL = Job(
    name="n", model="m", data="d", mode="split", adapter=Adapter(rank=3, matrices=("down",)),
    rounds=Rounds(batch_rows=2, row_tokens=16),
)  # fmt: skip
LAST = msgspec.structs.replace(ALL, adapter=msgspec.structs.replace(ALL.adapter, blocks="last"))
LOWRANK = msgspec.structs.replace(LAST, uplink_grad="lowrank")
BASE: Any = SimpleNamespace(config=CONFIG)
TOKENS = 2 * 16


def test_boards_are_told_of_it() -> None:
    reference = ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0)
    found = [(task.last_only, task.uplink_grad) for task in (task_of(job, reference, None) for job in (ALL, LOWRANK))]
    assert found == [(False, "cut"), (True, "lowrank")]


def test_the_longest_message_has_b_and_u_behind_the_features() -> None:
    states = 4 * TOKENS * CONFIG.hidden
    assert states_bytes(BASE, ALL) == states_bytes(BASE, LAST) == states
    assert states_bytes(BASE, LOWRANK) == states + 4 * 3 * (TOKENS + CONFIG.hidden)


@pytest.mark.parametrize("remember", [True, False])
def test_blocks_that_no_gradient_goes_through_keep_nothing(remember: bool) -> None:
    all_of, last = spec_of(ALL), spec_of(LAST)
    kept = (4 * CONFIG.hidden + 3 * CONFIG.ffn + sum((CONFIG.hidden, CONFIG.ffn))) if remember else CONFIG.hidden
    less = 4 * TOKENS * (CONFIG.blocks - 1) * kept
    for ends in (1, 5):
        found = [trunk_peak_bytes(CONFIG, 1000, spec, TOKENS, ends, remember) for spec in (all_of, last)]
        assert found[0] - found[1] >= less * (ends if remember else 1)
        one = trunk_peak_bytes(CONFIG, 1000, last, TOKENS, ends, remember, 1)
        assert one < found[1], "a segment of one block"
    assert peak_bytes(CONFIG, 1000, all_of, TOKENS, remember) - peak_bytes(CONFIG, 1000, last, TOKENS, remember) >= less
    encoder = [encoder_peak_bytes(BERT, 1000, spec, TOKENS, remember) for spec in (all_of, last)]
    assert encoder[0] > encoder[1]
    assert trunk_peak_bytes(BERT, 1000, all_of, TOKENS, 5, remember) > trunk_peak_bytes(
        BERT, 1000, last, TOKENS, 5, remember
    )


def test_a_board_with_the_ends_has_b_too() -> None:
    spec = spec_of(LOWRANK)
    assert ends_peak_bytes(CONFIG, 1000, spec, TOKENS, True) > ends_peak_bytes(CONFIG, 1000, spec, TOKENS)


def test_samples_that_are_drawn_by_chance_have_room_and_are_said_one_by_one() -> None:
    none = Part(graph=b"", files={}, ends=True, end_block=0)
    base = Base(
        config=CONFIG, parts={"ends": none, "trunk": none}, tokenizer=b"", digest="", end_id=None, wire_dtype="f32"
    )
    private = msgspec.structs.replace(LOWRANK, privacy=Privacy(epsilon=4.0))
    tokens, spec = private.step_rows * 16, spec_of(private)
    assert tokens > 10 * TOKENS and states_bytes(base, private) > 10 * states_bytes(base, LOWRANK)
    assert base.trunk_bytes(private, 3, True) > base.trunk_bytes(LOWRANK, 3, True)
    assert base.ends_bytes(private) == ends_peak_bytes(CONFIG, 0, spec, tokens, True, 16)
    assert base.ends_bytes(LOWRANK) == ends_peak_bytes(CONFIG, 0, spec, TOKENS, True)
    telling = msgspec.structs.replace(private, privacy=Privacy(epsilon=4.0, losses=True))
    assert base.ends_bytes(telling) == ends_peak_bytes(CONFIG, 0, spec, tokens, True, TOKENS), "batches are judged"


def test_a_step_goes_back_through_the_last_block_alone() -> None:
    whole, last = operations_of(BASE, ALL), operations_of(BASE, LAST)
    assert last / whole == pytest.approx((CONFIG.blocks + 1) / (2 * CONFIG.blocks))
