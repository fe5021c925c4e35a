"""Models that are no language models: read, cut, and computed stage by stage."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.engine.base import EngineFailed
from models.engine.items import ItemStage
from models.formats.bert import read_bert_config
from models.items.bert import build_bert
from models.items.cuts import Node, chosen_cuts, live_at_cuts
from models.items.manifest import ROWS, Port, bundle, bundle_bytes, views
from models.items.net import MAX_OPSET, net_of
from models.items.pack import PackedItems, kit_of_items, pack_items
from models.items.words import WordTokenizer
from tests.models.tiny_bert import CONFIG, reference, write_bert
from tests.models.tiny_net import NetBuilder, picture, unet_model
from wire.errors import CorruptData, EdgelamError, MalformedFrame, Refused, UsageError


def node(takes: str, gives: str, work: float = 1.0) -> Node:
    return Node(takes=tuple(takes), gives=tuple(gives), work=work)


UNET = [node("x", "a"), node("a", "b"), node("b", "c"), node("bc", "d"), node("ad", "e"), node("e", "y")]
"""a and b are skips."""


def test_skips_are_live_over_every_cut_between_their_ends() -> None:
    assert ["".join(names) for names in live_at_cuts(UNET, ["x"], ["y"])] == ["x", "a", "ab", "abc", "ad", "e", "y"]


def test_what_is_given_and_needed_late_is_live_until_then_and_what_nobody_needs_never_is() -> None:
    nodes = [node("x", "az"), node("a", "b"), node("bm", "y")]
    assert ["".join(names) for names in live_at_cuts(nodes, ["x", "m"], ["y", "a"])] == ["xm", "ma", "mab", "ay"]


def test_modules_end_where_little_crosses() -> None:
    sizes = dict(zip("xabcdey", (8, 8, 4, 2, 8, 3, 1), strict=True))
    crossing = live_at_cuts(UNET, ["x"], ["y"])
    cuts = chosen_cuts(UNET, crossing, sizes)
    assert cuts[0] == 1 and cuts[-1] == 5
    assert not chosen_cuts(UNET, crossing, dict.fromkeys("xy", 1))


def test_equal_blocks_are_cut_alike_and_their_norms_stay_with_them() -> None:
    nodes, names = [], "abcdefghijklmnopqrstuvwxyz"
    for block in range(6):
        one, two, three, four = names[4 * block], names[4 * block + 1], names[4 * block + 2], names[4 * block + 3]
        before = names[4 * block - 1] if block else "0"
        nodes += [node(before, one, 10), node(one + before, two, 0.01)]
        nodes += [node(two, three, 20), node(three + two, four, 0.01)]
    sizes = dict.fromkeys("0" + names, 4) | {names[4 * block + 2]: 16 for block in range(6)}
    assert chosen_cuts(nodes, live_at_cuts(nodes, ["0"], ["x"]), sizes) == [4, 8, 12, 16, 20]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def stage(packed: PackedItems, folder: Path, first: int, end: int) -> ItemStage:
    path = folder / f"{first}-{end}.onnx"
    path.write_bytes(packed.parts.graph_of(first, end)[0])
    return ItemStage.load(path, packed.files.values(), 1)


def whole(data: bytes, **inputs: Any) -> list[Any]:
    """What onnxruntime itself makes of the file as it was published, as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    found: list[Any] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, inputs)
    return found


def write_net(folder: Path, data: bytes) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(data)
    return path


def test_every_cut_of_a_net_with_skips_gives_the_bits_of_the_published_file(tmp_path: Path, cache: Path) -> None:
    data, image = unet_model(), picture()
    packed = pack_items(write_net(tmp_path, data), "net", cache)
    parts, files = packed.parts, list(packed.files.values())
    [expected] = whole(data, picture=image)
    given = bundle(packed.config.inputs, 1, {"picture": image})

    def run(begin: int, end: int, item: Any) -> Any:
        (tmp_path / "part.onnx").write_bytes(parts.net.run_of(begin, end, parts.crossing)[0])
        return ItemStage.load(tmp_path / "part.onnx", files, 1).run(item, 1)

    nodes = len(parts.net.nodes)
    for cut in range(1, nodes):
        middle = run(0, cut, given)
        assert middle.nbytes == bundle_bytes([parts.net.ports[name] for name in parts.crossing[cut]], 1)
        last = views(packed.config.outputs, 1, run(cut, nodes, middle))
        np.testing.assert_array_equal(last["scores"], expected)
    assert max(map(len, parts.crossing)) == 3, "both skips, and what goes down"
    assert len(parts) >= 4
    for index in range(len(parts)):
        given = stage(packed, tmp_path, index, index + 1).run(given, 1)
    np.testing.assert_array_equal(views(packed.config.outputs, 1, given)["scores"], expected)


def test_the_edges_of_a_graph_say_what_is_live_at_each_cut(tmp_path: Path, cache: Path) -> None:
    packed = pack_items(write_net(tmp_path, unet_model()), "net", cache)
    for cut in range(1, len(packed.parts)):
        live = {edge.tensor: edge.bytes_per_token for edge in packed.graph.live_at(cut)}
        crossing = packed.parts.crossing[packed.parts.ends[cut - 1]]
        assert live == {name: bundle_bytes([packed.parts.net.ports[name]], 1) for name in crossing}


def test_a_pack_is_found_again_and_a_damaged_one_made_again(tmp_path: Path, cache: Path) -> None:
    path = write_net(tmp_path, unet_model())
    first = pack_items(path, "net", cache)
    stamps = {file: file.stat().st_mtime_ns for file in first.files.values()}
    again = pack_items(path, "net", cache)
    assert again.files == first.files and again.graph == first.graph
    assert {file: file.stat().st_mtime_ns for file in again.files.values()} == stamps
    next(iter(stamps)).write_bytes(b"short")
    mended = pack_items(path, "net", cache)
    assert mended.files == first.files and next(iter(stamps)).stat().st_mtime_ns != next(iter(stamps.values()))


def test_modules_that_do_the_same_have_one_key_and_others_have_others(tmp_path: Path, cache: Path) -> None:
    packed = pack_items(write_bert(tmp_path / "bert"), "bert", cache)
    keys = [module.profile_key for module in packed.graph.modules]
    assert len(keys) == 8 and keys[1] == keys[3] == keys[5] and keys[2] == keys[4] and len(set(keys)) == 4
    assert [entry.key for entry in kit_of_items(packed)] == list(dict.fromkeys(keys))
    other = pack_items(write_net(tmp_path, unet_model()), "net", cache)
    assert not set(keys) & {module.profile_key for module in other.graph.modules}
    same = pack_items(write_net(tmp_path, unet_model(seed=2)), "net", cache)
    assert [module.profile_key for module in same.graph.modules] == [m.profile_key for m in other.graph.modules]
    assert not same.files.keys() & other.files.keys()


def test_made_up_weights_do_for_measuring(tmp_path: Path, cache: Path) -> None:
    packed = pack_items(write_net(tmp_path, unet_model()), "net", cache)
    for entry in kit_of_items(packed):
        path = tmp_path / "kit.onnx"
        path.write_bytes(entry.graphs[1])
        loaded = ItemStage.load_synthetic(path, 1, 1)
        out = views(loaded.manifest.outputs, 1, loaded.run(loaded.sample(1), 1))
        assert all(np.isfinite(tensor).all() for tensor in out.values())


def test_an_encoder_gives_the_vectors_of_the_formulas_for_texts_of_any_length(tmp_path: Path, cache: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    packed = pack_items(folder, "bert", cache)
    words = WordTokenizer.beside(folder)
    assert words is not None and packed.config.most_rows == 48
    encoder = stage(packed, tmp_path, 0, len(packed.parts))
    [port] = packed.config.inputs
    for text in ("hello", "the cat sat on the mat", "a board " * 23):
        ids = words.encode(text)
        out = encoder.run(bundle([port], len(ids), {port.name: np.array(ids)}), len(ids))
        vector = views(packed.config.outputs, len(ids), out)["embedding"]
        np.testing.assert_allclose(vector, reference(ids), atol=2e-6)
    assert len(words.encode("a board " * 23)) == 48, "the file's own limit of 8 tokens does not cut"


def test_a_stage_takes_nothing_of_another_size(tmp_path: Path, cache: Path) -> None:
    packed = pack_items(write_bert(tmp_path / "bert"), "bert", cache)
    first = stage(packed, tmp_path, 0, 1)
    assert not first.problem_with(8 * 5, 5)
    assert "0 rows" in first.problem_with(0, 0) and "49 rows" in first.problem_with(8 * 49, 49)
    assert "40 are due" in first.problem_with(41, 5)
    assert "rows" in first.problem_with(1 << 40, 1 << 37)
    with pytest.raises(MalformedFrame):
        views(packed.config.inputs, 5, np.zeros(41, np.uint8))
    with pytest.raises(EngineFailed, match=r"out of bounds|out of data bounds"):
        first.run(bundle(packed.config.inputs, 2, {"tokens": np.array([1, 10_000])}), 2)


def test_sizes_of_bundles_are_numbers_not_memory() -> None:
    port = Port("x", "f32", (ROWS, 1 << 24, 1 << 24))
    assert bundle_bytes([port], 65_536) == 65_536 * (1 << 48) * 4


def custom_operator(model: Any) -> None:
    model.graph.node[0].domain = "evil.corp"


def weights_elsewhere(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def with_subgraph(model: Any) -> None:
    branch = helper.make_graph([], "branch", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("then_branch", branch))


def dice(model: Any) -> None:
    model.graph.node.append(helper.make_node("RandomNormalLike", ["picture"], ["noise"]))


def newer(model: Any) -> None:
    model.opset_import[0].version = MAX_OPSET + 1


def backwards(model: Any) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])


def twice(model: Any) -> None:
    model.graph.node.append(model.graph.node[0])


def short_weights(model: Any) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def sizes_that_contradict(model: Any) -> None:
    [scores] = [tensor for tensor in model.graph.initializer if tensor.name == "scores.weight"]
    scores.dims[:] = [4, 10]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (custom_operator, Refused, "custom"),
        (weights_elsewhere, Refused, "other files"),
        (with_subgraph, Refused, "graph of its own"),
        (dice, Refused, "another answer each time"),
        (newer, Refused, "opset"),
        (backwards, CorruptData, "nothing before it gives"),
        (twice, CorruptData, "made twice"),
        (short_weights, CorruptData, "damaged"),
        (sizes_that_contradict, Refused, "contradict"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    change: Callable[[Any], None], error: type[EdgelamError], words: str, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(error, match=words):
        pack_items(write_net(tmp_path, unet_model(change=change)), "net", cache)


def test_a_damaged_file_is_an_error_and_never_a_crash(tmp_path: Path, cache: Path) -> None:
    chance, data = random.Random(1), unet_model()
    for number in range(60):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(len(broken))] = chance.getrandbits(8)
        if number % 3 == 0:
            del broken[chance.randrange(len(broken)) :]
        try:
            pack_items(write_net(tmp_path, bytes(broken)), "net", cache / str(number))
        except (Refused, CorruptData):
            continue


def test_a_large_constant_is_declared_and_not_made(tmp_path: Path, cache: Path) -> None:
    def huge(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        del tensor.dims[:]
        tensor.dims.extend([1 << 20, 3, 1 << 10, 1 << 10])

    with pytest.raises((Refused, CorruptData)):
        pack_items(write_net(tmp_path, unet_model(change=huge)), "net", cache)


def test_constants_and_what_follows_from_them_cross_no_cut(tmp_path: Path, cache: Path) -> None:
    build = NetBuilder()
    build.node("Constant", [], "two", value=numpy_helper.from_array(np.array(2.0, np.float32)))
    build.node("Sqrt", ["two"], "root")
    states = "picture"
    for index in range(4):
        states = build.node("Mul", [build.conv(f"c{index}", states, 3, 3), "root"], f"scaled{index}")
    value = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, 16, 16])
    out = helper.make_tensor_value_info(states, TensorProto.FLOAT, [1, 3, 16, 16])
    data = build.model([value], [out]).SerializeToString()
    packed = pack_items(write_net(tmp_path, data), "net", cache)
    assert len(packed.parts) == 4
    assert all(len(packed.parts.crossing[end]) == 1 for end in packed.parts.ends)
    given = bundle(packed.config.inputs, 1, {"picture": picture()})
    for index in range(4):
        given = stage(packed, tmp_path, index, index + 1).run(given, 1)
    np.testing.assert_array_equal(views(packed.config.outputs, 1, given)[states], whole(data, picture=picture())[0])


def test_an_open_batch_is_one_and_a_second_open_size_counts_rows() -> None:
    def opened(model: Any) -> None:
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_param = "batch"

    net = net_of(unet_model(change=opened), "net", 512)
    assert not net.has_rows and net.given[0].shape == (1, 3, 16, 16)


def test_configurations_that_can_not_be_are_refused(tmp_path: Path) -> None:
    import json

    for change, error in (
        ({"model_type": "gpt2"}, Refused),
        ({"hidden_act": "silu"}, Refused),
        ({"hidden_size": 33}, CorruptData),
        ({"num_hidden_layers": 10**9}, CorruptData),
        ({"vocab_size": 10}, CorruptData),
        ({"num_attention_heads": "many"}, CorruptData),
    ):
        folder = write_bert(tmp_path / "bert")
        (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
        with pytest.raises(error):
            build_bert(folder)
    with pytest.raises(UsageError):
        read_bert_config(tmp_path / "nowhere")
    (tmp_path / "bert" / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptData):
        WordTokenizer.beside(tmp_path / "bert")
