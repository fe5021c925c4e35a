"""One block at every depth, its matrices divided: gradients, steps and losses are those of one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

torch = pytest.importorskip("torch")

from models.families.bert import BertConfig  # noqa: E402
from models.lora.adapter import HEAD, AdapterSpec, Floats, named  # noqa: E402
from models.lora.looped import (  # noqa: E402
    at_every_depth,
    joined,
    part_of,
    shapes_of_hub,
    shapes_of_shard,
)
from models.lora.whole import shapes_of  # noqa: E402
from models.training.looped import Hub, Shard  # noqa: E402
from models.training.looping import HubRound  # noqa: E402
from models.training.samples import Split  # noqa: E402
from models.training.split import Misled, Question  # noqa: E402
from tests.models.tiny_bert import CONFIG, write_bert  # noqa: E402
from tests.training.looped_models import PARTS, Looped, LoopedTogether, shares_of  # noqa: E402
from tests.training.split_models import InOnePlace, asked, rows_of, task_of  # noqa: E402
from wire.shares import Share  # noqa: E402

pytestmark = pytest.mark.torch

SPEC = AdapterSpec(rank=1, alpha=1.0, seed=4, labels=3)
SHARES = {"two": ((3, 1), (40, 24)), "three": ((1, 2, 1), (7, 50, 7)), "one": ((4,), (64,))}
DEVICES = ("a", "b", "c")


def config_of(**changes: Any) -> BertConfig:
    return BertConfig(**{**{key: value for key, value in CONFIG.items() if key != "type_vocab_size"}, **changes})  # type: ignore[arg-type]


def rows(held_out: int = 0) -> dict[str, Split]:
    rng = np.random.default_rng(3)
    return {
        device: Split(rows_of(rng, 4 + place, 16, 3), rows_of(rng, held_out, 16, 3) if held_out else ())
        for place, device in enumerate(DEVICES)
    }


def plain(weights: dict[str, Any], states: Any, lengths: Any, loops: int, heads: int) -> Any:
    """Means of what one block makes at every depth, by the formulas of the Bert paper (arXiv 1810.04805), in whatever
    precision its weights have."""

    def through(name: str, rows_: Any) -> Any:
        return rows_ @ weights[f"block.0.{name}.weight.w"].T + weights[f"block.0.{name}.bias.w"][0]

    def norm(name: str, rows_: Any) -> Any:
        centred = rows_ - rows_.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-12)
        return scaled * weights[f"block.0.{name}.weight.w"][0] + weights[f"block.0.{name}.bias.w"][0]

    n, tokens, width = states.shape
    is_text = torch.arange(tokens)[None, :] < lengths[:, None]
    for _ in range(loops):
        query, key, value = (
            through(name, states).reshape(n, tokens, heads, -1).permute(0, 2, 1, 3) for name in ("q", "k", "v")
        )
        scores = query @ key.transpose(2, 3) / (width // heads) ** 0.5
        scores = scores.masked_fill(~is_text[:, None, None, :], -1e30)
        mixed = (torch.softmax(scores, -1) @ value).permute(0, 2, 1, 3).reshape(n, tokens, width)
        states = norm("norm0", through("o", mixed) + states)
        wide = through("up", states)
        bent = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
        states = norm("norm1", through("down", bent) + states)
    return (states * is_text[:, :, None]).sum(1) / lengths[:, None]


@pytest.mark.parametrize("loops", [1, 2, 6])
@pytest.mark.parametrize("shares", sorted(SHARES))
@pytest.mark.parametrize(("precision", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_features_and_gradients_are_those_of_the_formulas(
    precision: Any, within: float, shares: str, loops: int, tmp_path: Path
) -> None:
    looped = Looped(write_bert(tmp_path), SPEC, shares_of(*SHARES[shares]), ())
    start, shaped = looped.vectors_of(looped.start)[0], looped.shaped_of[0]
    hub = HubRound(looped.hub, shaped, task_of(SPEC, 1), asked(PARTS), start, ("a",), loops)
    for part in (looped.hub, *looped.shards):  # what the round computes with
        part.factors = {name: factor.detach().to(precision).requires_grad_() for name, factor in part.factors.items()}
    rng = np.random.default_rng(5)
    lengths = np.array([7, 3, 5])
    states = rng.standard_normal((3, 7, 32)).astype(np.float64 if precision == torch.float64 else np.float32)
    weights = {
        name: torch.tensor(values, dtype=precision, requires_grad=True)
        for name, values in named(looped.start, looped.shaped).items()
    }
    features = plain(weights, torch.from_numpy(states), torch.from_numpy(lengths), loops, 4)
    gradient = rng.standard_normal(features.shape)
    gradient *= 1e-3 / np.abs(gradient).max()
    (features * torch.from_numpy(gradient).to(precision)).sum().backward()

    assert hub.begin("a", Question(0, False, states, lengths), 1)
    made = through(hub, looped)
    assert made is not None
    np.testing.assert_allclose(made[:96].reshape(3, 32), features.detach().numpy(), rtol=within, atol=within)
    hub._stage.factors[HEAD].grad = None
    hub._came["a"] = np.concatenate([gradient.reshape(-1), np.zeros(99)]).astype(states.dtype)
    hub.begin_back()
    assert through(hub, looped) is None and hub.added
    found = joined([{n: f.grad.numpy() for n, f in part.factors.items()} for part in (looped.hub, *looped.shards)])
    scale = max(float(weights[name].grad.abs().max()) for name in found if name != HEAD)
    for name, values in found.items():
        if name != HEAD:
            np.testing.assert_allclose(values, weights[name].grad.numpy(), atol=within * scale, err_msg=name)


def through(hub: HubRound, looped: Looped) -> Floats | None:
    made = None
    while hub.busy:
        want, parts = hub.wanted, []
        for shard in looped.shards:
            values, lengths = torch.from_numpy(want.values.copy()), torch.from_numpy(want.lengths)
            if want.backwards:
                parts.append(shard.backwards(want.part, values[0], values[1], lengths).numpy())
            else:
                parts.append(shard.made(want.part, values, lengths).detach().numpy())
        made = hub.answered(parts)
    return made


@pytest.mark.parametrize(
    "shares", [one if one == "three" else pytest.param(one, marks=pytest.mark.slow) for one in sorted(SHARES)]
)
def test_twenty_steps_have_the_losses_and_weights_of_one_place(shares: str, tmp_path: Path) -> None:
    looped = Looped(write_bert(tmp_path), SPEC, shares_of(*SHARES[shares]), DEVICES)
    task = task_of(SPEC, 20, labels=("x", "y", "z"), learning_rate=0.002)
    together = LoopedTogether(looped, rows(), task)
    one = InOnePlace(looped.whole, rows(), task, looped.start, PARTS)
    for number in range(20):
        assert together.step() == pytest.approx(one.step(), abs=1e-5), number
    assert together.hub.over and all(shard.over for shard in together.shards)
    expected = named(one.vector(), looped.shaped)
    for name, values in named(together.vector(), looped.shaped).items():
        if name != "block.0.k.bias.w":  # its gradient is zero, but for rounding
            np.testing.assert_allclose(values, expected[name], atol=2e-4, err_msg=name)
    assert together.turns == 20 * len(DEVICES) * 2 * 2 * looped.config.blocks


def test_gradients_of_a_step_are_those_of_one_place_as_they_are_clipped(tmp_path: Path) -> None:
    looped = Looped(write_bert(tmp_path), SPEC, shares_of(*SHARES["three"]), DEVICES)
    task = task_of(SPEC, 1, labels=("x", "y", "z"), most_norm=0.05)
    together = LoopedTogether(looped, rows(), task)
    one = InOnePlace(looped.whole, rows(), task, looped.start, PARTS)
    found: dict[str, Any] = {}
    for part, leaves in zip(
        ("hub", *range(3)), (together.hub._leaves, *(shard._leaves for shard in together.shards)), strict=True
    ):
        step = leaves._optimiser.step

        def keep(part: Any = part, leaves: Any = leaves, step: Any = step) -> None:
            found[part] = {name: leaf.grad.numpy().copy() for name, leaf in leaves._leaves.items()}
            step()

        leaves._optimiser.step = keep
    together.step()
    one.step()
    gradients = joined([found["hub"], *(found[number] for number in range(3))])
    length = np.sqrt(sum(float((values.astype(np.float64) ** 2).sum()) for values in gradients.values()))
    assert length == pytest.approx(0.05, rel=1e-4), "it was shortened as a whole"
    for name, values in one.gradients().items():
        np.testing.assert_allclose(gradients[name], values, atol=1e-5 * 0.05, err_msg=name)


@pytest.mark.parametrize("order", [("c", "a", "b"), ("b", "c", "a")])
def test_in_whatever_order_boards_come_the_bits_are_the_same(order: tuple[str, ...], tmp_path: Path) -> None:
    looped = Looped(write_bert(tmp_path), SPEC, shares_of(*SHARES["three"]), DEVICES)
    task = task_of(SPEC, 3, labels=("x", "y", "z"))
    vectors = []
    for one in ((), order):
        together = LoopedTogether(looped, rows(2), task)
        together.judge()
        for _ in range(3):
            together.step(one)
        vectors.append(together.vector())
    assert np.array_equal(*vectors)


@pytest.mark.parametrize("loops", [1, 3, 24])
def test_what_a_shard_holds_is_its_share_of_one_block_at_any_depth(loops: int, tmp_path: Path) -> None:
    write_bert(tmp_path)
    config = config_of(num_hidden_layers=loops)
    block = 4 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * (3 * 32 + 64)
    held = []
    for share in shares_of((1, 3), (16, 48)):
        shaped = shapes_of_shard(config, share)
        shard = Shard(config, share, {name: np.zeros(shape, np.float32) for name, shape in shaped.items()})
        held.append(sum(4 * factor.numel() for factor in shard.factors.values()))
    assert held == [block // 4, 3 * block // 4] and sum(held) == block
    of_tensors = [value for value in vars(shard).values() if isinstance(value, torch.Tensor)]
    assert not of_tensors, "nothing but its factors"


def test_a_shard_keeps_nothing_of_a_batch_between_its_turns(tmp_path: Path) -> None:
    looped = Looped(write_bert(tmp_path), SPEC, shares_of(*SHARES["two"]), DEVICES)
    together = LoopedTogether(looped, rows(), task_of(SPEC, 2, labels=("x", "y", "z")))
    shard = together.shards[0]
    kept = set(vars(shard)) | set(vars(shard._stage))
    together.step()
    assert set(vars(shard)) | set(vars(shard._stage)) == kept == {"_stage", "_leaves", "_steps", "step", "_heads",
                                                                  "_head_width", "factors"}  # fmt: skip


@given(some.data())
def test_whatever_the_shares_their_parts_join_to_the_whole(data: some.DataObject) -> None:
    heads = data.draw(some.integers(1, 6))
    columns = data.draw(some.integers(heads, 20))
    shards = data.draw(some.integers(1, heads))
    config = config_of(hidden_size=2 * heads, num_attention_heads=heads, intermediate_size=columns, num_hidden_layers=3)
    cuts = [
        (0, *sorted(data.draw(some.sets(some.integers(1, many - 1), min_size=shards - 1, max_size=shards - 1))), many)
        if many > 1
        else (0, 1)
        for many in (heads, columns)
    ]
    shares = [
        Share(
            first_head=cuts[0][one], end_head=cuts[0][one + 1], first_column=cuts[1][one], end_column=cuts[1][one + 1]
        )
        for one in range(shards)
    ]
    shaped = {name: shape for name, shape in shapes_of(config).items() if name.startswith("block.0.")}
    chance = np.random.default_rng(1)
    weights = {name: chance.standard_normal(shape).astype(np.float32) for name, shape in shaped.items()}
    weights[HEAD] = chance.standard_normal((2, 2 * heads + 1)).astype(np.float32)
    parts = [part_of(config, weights, share) for share in (None, *shares)]
    wanted = [shapes_of_hub({**shaped, HEAD: (2, 2 * heads + 1)}), *(shapes_of_shard(config, one) for one in shares)]
    assert [{name: values.shape for name, values in part.items()} for part in parts] == wanted
    again = joined(parts)
    assert again.keys() == weights.keys()
    assert all(np.array_equal(again[name], weights[name]) for name in weights)
    deep = at_every_depth(config, again)
    assert deep.keys() == shapes_of(config).keys()
    assert np.array_equal(deep["block.2.up.bias.w"], weights["block.0.up.bias.w"])


def test_shares_that_a_model_has_not_are_refused() -> None:
    good = {"first_head": 0, "end_head": 2, "first_column": 0, "end_column": 9}
    for wrong in ({"end_head": 5}, {"end_head": 0}, {"end_column": 65}, {"first_column": 9}):
        with pytest.raises(ValueError, match=r"(heads|columns) \d"):
            shapes_of_shard(config_of(), Share(**{**good, **wrong}))


def test_a_batch_that_the_model_makes_no_numbers_of_is_dropped_and_its_board_named(tmp_path: Path) -> None:
    looped = Looped(write_bert(tmp_path), SPEC, shares_of(*SHARES["two"]), DEVICES)
    together = LoopedTogether(looped, rows(), task_of(SPEC, 2, labels=("x", "y", "z")))
    nothing = Question(0, False, np.full((1, 3, 32), np.nan, np.float32), np.array([3]))
    assert together.hub.begin("b", nothing, 4)
    with pytest.raises(Misled, match="makes no numbers of") as raised:
        together.through()
    assert raised.value.device == "b" and not together.hub.busy
    assert not together.hub.begin("b", nothing._replace(step=1), 4), "another step"
    assert not together.hub.take("b", 0, np.zeros(3, np.float32)), "it was given no features"
    assert isinstance(looped.hub, Hub)
