"""Job files: what they say, and all that is wrong with one at once."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coordinator.rounds.job import Adapter, Job, Modality, Rounds
from coordinator.rounds.jobfile import checked, load_job
from wire.errors import UsageError
from wire.privacy import Channel, Privacy
from wire.samples import Images, Series

SMALL = 'model = "smollm2"\ndata = "notes"\n'


def load(folder: Path, text: str, name: str = "my_notes.toml") -> Job:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_job(path)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(folder, text)
    return [line.strip() for line in str(caught.value.message).splitlines()[1:]]


def test_labels_are_at_least_two_and_each_once(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL + 'labels = ["a", "b"]\n').labels == ("a", "b")
    assert any("nothing to tell apart" in said for said in problems(tmp_path, SMALL + 'labels = ["a"]\n'))
    assert any("listed twice" in said for said in problems(tmp_path, SMALL + 'labels = ["a", "a"]\n'))
    assert any(said.startswith("labels:") for said in problems(tmp_path, SMALL + 'labels = ["a", ""]\n'))


def test_what_is_left_out_has_values_and_the_file_gives_the_name(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL) == Job(name="my-notes", model="smollm2", data="notes")


def test_all_that_can_be_said_is_taken(tmp_path: Path) -> None:
    text = """
        name = "n1"
        model = "smollm2"
        data = "notes"
        precision = "int8"
        devices = ["pi4", "pi5"]
        seed = 7
        [adapter]
        rank = 4
        alpha = 4
        matrices = ["q", "down"]
        [rounds]
        count = 3
        steps = 2
        batch_rows = 1
        row_tokens = 64
        learning_rate = 0.01
        most_norm = 0.5
        aggregation = "rolora"
        who = "round-robin"
        devices = 1
        at_least = 1
        timeout_s = 20
        held_out = 0
        [privacy]
        epsilon = 2
        unit = "device"
        [privacy.channel]
        sigma = 0.5
    """
    job = load(tmp_path, text)
    assert job.devices == ("pi4", "pi5") and job.seed == 7
    assert job.adapter == Adapter(rank=4, alpha=4.0, matrices=("q", "down")) and job.adapter.scale_alpha == 4.0
    assert job.rounds.aggregation == "rolora" and job.rounds.held_out == 0
    assert job.privacy == Privacy(epsilon=2.0, unit="device", channel=Channel(sigma=0.5))
    assert checked(job) == job


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = problems(
        tmp_path,
        """
        modle = "smollm2"
        data = 5
        mode = "magic"
        [adapter]
        rank = 0
        [rounds]
        learning_rate = "high"
        held_out = 1.0
        speed = 3
        """,
    )
    starts = [line.split(":")[0] for line in said]
    assert starts == [
        "modle", "data", "mode", "adapter.rank", "rounds.speed", "rounds.learning_rate", "rounds.held_out", "model",
    ]  # fmt: skip


def test_what_contradicts_itself_is_said_beside_what_is_wrong_by_itself(tmp_path: Path) -> None:
    more = "[rounds]\nwho = 'scheduled'\nairtime = 'equal'\ntradeoff = 'much'\n[privacy]\nepsilon = 0\n"
    said = [line.split(":")[0] for line in problems(tmp_path, SMALL + more)]
    assert said == ["rounds.tradeoff", "privacy.epsilon", "rounds.delay_s", "rounds.airtime"]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ('devices = ["pi4", "pi4"]', "devices"),
        ('devices = ["Pi 4"]', "devices"),
        ('name = "has spaces"', "name"),
        ("[rounds]\nwho = 'all'\ndevices = 3", "rounds.devices"),
        ("devices = ['a']\n[rounds]\nwho = 'random'\ndevices = 3\n", "rounds.devices"),
        ("devices = ['a']\n[rounds]\nat_least = 2\n", "rounds.at_least"),
        ("[adapter]\nmatrices = ['q', 'q']", "adapter.matrices"),
        ("[adapter]\nranks = { pi4 = 9 }\n[rounds]\naggregation = 'pad'", "adapter.ranks.pi4"),
        ("[adapter]\nranks = { 'Pi 4' = 2 }\n[rounds]\naggregation = 'svd'", "adapter.ranks"),
        ("[adapter]\nranks = { pi4 = 2 }", "rounds.aggregation"),
        ("adapter = 3", "adapter"),
        ("[rounds]\nwho = 'scheduled'", "rounds.delay_s"),
        ("[rounds]\nwho = 'scheduled'\ndelay_s = 2\ndevices = 2", "rounds.devices"),
        ("[rounds]\nwho = 'fastest'\ntradeoff = 2", "rounds.tradeoff"),
        ("[rounds]\ndelay_s = 2", "rounds.delay_s"),
        ("[rounds]\nairtime = 'equal'", "rounds.airtime"),
        ("[rounds]\nmedium = 'ether'", "rounds.medium"),
        ("[rounds]\nmiddle = 'median'\naggregation = 'svd'", "rounds.middle"),
        ("[rounds]\nmost_change = 0.5", "rounds.most_change"),
        ("[privacy]\nunit = 'device'", "privacy.epsilon"),
        ("[privacy]\nepsilon = 1\nnoise = 3", "privacy.noise"),
        ("[privacy]\nepsilon = 1\nunit = 'room'", "privacy.unit"),
        ("[privacy]\nepsilon = 1\n[privacy.channel]\npower = 0", "privacy.channel.power"),
        ("[privacy]\nepsilon = 1e-6", "privacy.epsilon"),
        ("bad_rows = 'mend'", "bad_rows"),
        ("bad_rows = 'refuse'\n[privacy]\nepsilon = 1", "bad_rows"),
        ("trunk = 'nuc'", "trunk"),
        ("mode = 'split'\ntrunk = 'My NUC'", "trunk"),
        ("mode = 'halved'", "mode"),
        ("mode = 'looped'\ntrain = 'blocks'\nlabels = ['a', 'b']\n[rounds]\nwho = 'fastest'", "rounds.who"),
        ("mode = 'split'\n[rounds]\nwho = 'scheduled'", "rounds.delay_s"),
        ("mode = 'split'\n[rounds]\naggregation = 'svd'", "rounds.aggregation"),
        ("mode = 'split'\n[rounds]\nmiddle = 'median'", "rounds.middle"),
        ("mode = 'split'\n[rounds]\nmost_change = 3", "rounds.most_change"),
        ("mode = 'split'\n[rounds]\nmedium = 'shared'", "rounds.medium"),
        ("mode = 'split'\n[rounds]\nrows_at_once = 2", "rounds.rows_at_once"),
        ("mode = 'split'\n[rounds]\nbatch_rows = 2000", "rounds.batch_rows"),
        ("mode = 'split'\n[privacy]\nepsilon = 1", "privacy"),
        ("mode = 'pipeline'\ntrunk = 'nuc'", "trunk"),
        ("mode = 'pipeline'\ntrunk = ['nuc', 'nuc']", "trunk"),
        ("mode = 'pipeline'\ntrunk = ['nuc', 'My NUC']", "trunk"),
        ("mode = 'pipeline'\n[rounds]\nmiddle = 'median'", "rounds.middle"),
        ("[adapter]\nblocks = 'first'", "adapter.blocks"),
        ("train = 'blocks'\nlabels = ['a', 'b']\n[adapter]\nblocks = 'last'", "adapter"),
        ("uplink_grad = 'factor'", "uplink_grad"),
        ("uplink_grad = 'lowrank'\n[adapter]\nblocks = 'last'\nmatrices = ['down']", "uplink_grad"),
        ("mode = 'auto'\nuplink_grad = 'lowrank'\n[adapter]\nblocks = 'last'\nmatrices = ['down']", "uplink_grad"),
        ("mode = 'split'\nuplink_grad = 'lowrank'\n[adapter]\nmatrices = ['down']", "adapter.blocks"),
        ("mode = 'split'\nuplink_grad = 'lowrank'\n[adapter]\nblocks = 'last'", "adapter.matrices"),
        (
            "mode = 'split'\nuplink_grad = 'lowrank'\nlabels = ['a', 'b']\n"
            "[adapter]\nblocks = 'last'\nmatrices = ['down']",
            "uplink_grad",
        ),
        ("mode = 'split'\nuplink_grad = 'lowrank'\nlabels = ['a', 'b']\ntrain = 'blocks'", "uplink_grad"),
        ("mode = 'split'\n[rounds]\naggregation = 'fedsa'", "rounds.aggregation"),
        ("mode = 'split'\n[rounds]\naggregation = 'stack'", "rounds.aggregation"),
        ("[rounds]\naggregation = 'fedsa'\n[adapter]\nranks = { pi4 = 2 }", "rounds.aggregation"),
        ("[rounds]\naggregation = 'stack'\nmiddle = 'median'", "rounds.middle"),
        ("[rounds]\naggregation = 'stack'\n[adapter]\nrank = 16\nmost_rank = 8", "adapter.most_rank"),
        ("[rounds]\naggregation = 'svd'\n[adapter]\nmost_rank = 32", "adapter.most_rank"),
        ("secure = true\n[rounds]\nat_least = 3\naggregation = 'stack'", "rounds.aggregation"),
        ("train = 'head'", "train"),
        ("train = 'blocks'", "train"),
        ("train = 'blocks'\nlabels = ['a', 'b']\n[adapter]\nrank = 2", "adapter"),
        ("train = 'blocks'\nlabels = ['a', 'b']\n[rounds]\naggregation = 'ffa'", "rounds.aggregation"),
        ("train = 'blocks'\nlabels = ['a', 'b']\n[privacy]\nepsilon = 1", "privacy"),
    ],
)
def test_what_contradicts_itself_is_refused(more: str, key: str, tmp_path: Path) -> None:
    assert [line.split(":")[0] for line in problems(tmp_path, SMALL + more)] == [key]


def test_what_goes_with_b_of_one_s_own_and_with_fresh_factors(tmp_path: Path) -> None:
    own = "secure = true\nlabels = ['a', 'b']\n[privacy]\nepsilon = 4\n[rounds]\nat_least = 3\naggregation = 'fedsa'\n"
    assert load(tmp_path, SMALL + own).begins == "own-b"
    assert (
        load(tmp_path, SMALL + "[rounds]\naggregation = 'fedsa'\nmiddle = 'median'\nmost_change = 3\n").begins
        == "own-b"
    )
    fresh = "[privacy]\nepsilon = 4\n[rounds]\naggregation = 'stack'\nmost_change = 3\n[adapter]\nranks = { pi4 = 2 }\n"
    assert load(tmp_path, SMALL + fresh).begins == "fresh" and load(tmp_path, SMALL).begins == "shared"


@pytest.mark.parametrize("text", ["= 3", "model = ", "\x00"])
def test_what_is_no_toml_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not TOML"):
        load(tmp_path, text)
    with pytest.raises(UsageError, match="no such file"):
        load_job(tmp_path / "gone.toml")


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora"])
@pytest.mark.parametrize("mode", ["split", "pipeline"])
def test_gradients_by_a_low_rank_matrix_go_with_factors_at_the_last_matrix_alone(
    mode: str, rule: str, tmp_path: Path
) -> None:
    assert load(tmp_path, SMALL).uplink_grad == "cut" and load(tmp_path, SMALL).adapter.blocks == "all"
    asked = f"mode = '{mode}'\nuplink_grad = 'lowrank'\n"
    more = f"[adapter]\nblocks = 'last'\nmatrices = ['down']\n[rounds]\naggregation = '{rule}'\n"
    job = load(tmp_path, SMALL + asked + more)
    assert (job.uplink_grad, job.adapter.blocks) == ("lowrank", "last") and checked(job) == job
    said = problems(tmp_path, SMALL + "uplink_grad = 'lowrank'\nlabels = ['a', 'b']\n[rounds]\nmiddle = 'mode'\n")
    assert said == [
        "rounds.middle: Invalid enum value 'mode'",
        "uplink_grad: 'lowrank' goes with mode = 'split' or 'pipeline', not with 'federated'",
        "uplink_grad: 'lowrank' is for language models, which learn no labels",
        "adapter.blocks: 'all'; uplink_grad = 'lowrank' wants 'last'",
        "adapter.matrices: q, v; uplink_grad = 'lowrank' wants down alone, the last before the cut",
    ]


PRIVATE = (
    SMALL
    + """
    mode = "split"
    uplink_grad = "lowrank"
    [adapter]
    blocks = "last"
    matrices = ["down"]
    [privacy]
    epsilon = 4
"""
)


@pytest.mark.parametrize("mode", ["split", "pipeline"])
def test_a_split_model_is_private_where_noise_can_be_on_all_gradients(mode: str, tmp_path: Path) -> None:
    text = PRIVATE.replace("split", mode)
    assert load(tmp_path, text + "[rounds]\naggregation = 'ffa'\n").privacy == Privacy(epsilon=4.0)
    for more, key in (
        ("", "rounds.aggregation"),
        ("[rounds]\naggregation = 'rolora'\n", "rounds.aggregation"),
        ("unit = 'device'\n[rounds]\naggregation = 'ffa'\n", "privacy.unit"),
        ("[rounds]\naggregation = 'ffa'\nsteps = 1001\n", "rounds.steps"),
        ("[rounds]\naggregation = 'ffa'\nbatch_rows = 800\n", "rounds.batch_rows"),
    ):
        assert [line.split(":")[0] for line in problems(tmp_path, text + more)] == [key], more
    [said] = problems(tmp_path, text.replace('uplink_grad = "lowrank"', "") + "[rounds]\naggregation = 'ffa'\n")
    assert said.startswith("privacy: not with") and "uplink_grad = 'lowrank'" in said
    job = load(tmp_path, text + "[rounds]\naggregation = 'ffa'\nbatch_rows = 4\n")
    assert job.step_rows > 4 == msgspec.structs.replace(job, privacy=None).step_rows


def test_with_any_split_job_are_private_ones_that_are_not(tmp_path: Path) -> None:
    """Sentence encoders, whose task module is trained beside the factors, and one block at every depth."""
    labels = 'mode = "split"\nlabels = ["a", "b"]\n[privacy]\nepsilon = 4\n'
    assert [line.split(":")[0] for line in problems(tmp_path, SMALL + labels)] == ["privacy"]
    looped = 'mode = "looped"\ntrain = "blocks"\nlabels = ["a", "b"]\n[privacy]\nepsilon = 4\n'
    assert "privacy" in {line.split(":")[0] for line in problems(tmp_path, SMALL + looped)}


def test_a_job_that_came_as_json_is_checked_too() -> None:
    job = Job(name="n", model="m", data="d", rounds=Rounds(at_least=3), devices=("a",))
    with pytest.raises(UsageError, match=r"rounds\.at_least"):
        checked(msgspec.json.decode(msgspec.json.encode(job), type=Job))


def test_secure_is_refused_with_all_that_needs_single_updates(tmp_path: Path) -> None:
    assert not load(tmp_path, SMALL).secure
    for rule in ("fedavg", "ffa", "rolora"):
        text = SMALL + f'secure = true\n[rounds]\nat_least = 3\naggregation = "{rule}"\n[privacy]\nepsilon = 4\n'
        assert load(tmp_path, text).secure
    said = problems(
        tmp_path,
        SMALL
        + """
        secure = true
        devices = ["a", "b"]
        [adapter]
        ranks = { a = 2 }
        [rounds]
        aggregation = "svd"
        most_change = 3
        who = "scheduled"
        delay_s = 3
        medium = "shared"
        [privacy]
        epsilon = 4
        unit = "device"
        [privacy.channel]
        """,
    )
    for start in (
        "rounds.most_change: 3.0 looks at each update",
        "rounds.medium: 'shared'",
        "rounds.aggregation: svd is no sum",
        "rounds.who: 'scheduled'",
        "adapter.ranks: not with secure",
        "rounds.at_least: 1; with secure at least 3",
        "privacy.channel: noise without a bound",
    ):
        assert any(one.startswith(start) for one in said), (start, said)
    assert problems(tmp_path, SMALL + "secure = 2\n")[0].startswith("secure:")
    both = SMALL + 'mode = "split"\nsecure = true\n[rounds]\nat_least = 3\n'
    assert problems(tmp_path, both) == [
        "secure: not with mode = 'split': states and gradients can't be masked, each is needed by itself"
    ]
    for key in ("middle = 'trimmed'", "at_least = 49"):
        text = SMALL + f"secure = true\n[rounds]\nat_least = 3\n{key}\n".replace("at_least = 3\nat", "at")
        assert len(problems(tmp_path, text)) == 1
    few = SMALL + 'secure = true\ndevices = ["a", "b"]\n[rounds]\nat_least = 3\n'
    assert problems(tmp_path, few) == ["rounds.at_least: 3 updates from 2 devices"]


WATCH = """
    model = "series"
    data = "watch"
    labels = ["a", "b"]
    [series]
    columns = ["ax", "ay"]
"""


def test_a_job_says_which_columns_are_readings(tmp_path: Path) -> None:
    wanted = load(tmp_path, WATCH + 'label = "activity"\nwindow = 50\nstride = 25\ncentre = [1, 0]\n')
    assert wanted.series == Series(
        columns=("ax", "ay"), label="activity", window=50, stride=25, centre=(1.0, 0.0)
    ) and wanted.on_features and checked(wanted) == wanted  # fmt: skip
    assert wanted.series is not None and wanted.series.step == 25
    assert Series(columns=("ax",), window=50).step == 50


def test_what_means_nothing_with_readings_is_said_at_once(tmp_path: Path) -> None:
    text = """
        model = "smollm2"
        data = "watch"
        mode = "split"
        [adapter]
        rank = 4
        [rounds]
        aggregation = "ffa"
        row_tokens = 64
        [series]
        columns = ["ax", "ay", "ax"]
        label = "ay"
        most_gap = 1.0
        scale = [1]
        window = 16384
    """
    found = problems(tmp_path, text)
    said = ["model: 'smollm2' takes no readings", "labels: missing", "mode: 'split'", "adapter: means nothing",
            "rounds.aggregation: ffa", "rounds.row_tokens:", "series.columns: one is named twice", "series.most_gap:",
            "series.scale: 1 numbers for 3 columns"]  # fmt: skip
    assert all(any(line.startswith(word) for line in found) for word in said), found
    assert len(found) == len(said)
    many = [f"c{number}" for number in range(16)]
    long = problems(tmp_path, WATCH.replace('["ax", "ay"]', repr(many).replace("'", '"')) + "window = 16384\n")
    assert [line.split(":")[0] for line in long] == ["series.window"]
    none = problems(tmp_path, 'model = "series"\ndata = "watch"\nlabels = ["a", "b"]\n')
    assert none == ["series: missing; it says which columns are readings"]
    wrong = problems(tmp_path, WATCH + "window = 8\nstrides = 3\nscale = [1, 0]\n")
    assert sorted(line.split(":")[0] for line in wrong) == ["series.scale", "series.strides", "series.window"]


def test_pictures_are_a_kind_of_samples_of_their_own(tmp_path: Path) -> None:
    text = 'model = "vit"\ndata = "photos"\nlabels = ["cat", "dog"]\n[images]\nmost_images = 100\n'
    wanted = load(tmp_path, text)
    assert wanted.images == Images(most_images=100) and wanted.on_features and checked(wanted) == wanted
    found = problems(
        tmp_path, text.replace("labels", "#") + 'pool = "last"\nmean = [0, 0]\n[series]\ncolumns = ["a"]\n'
    )
    assert sorted(line.split(":")[0] for line in found) == ["images.mean", "images.pool", "labels", "model"], found
    both = problems(tmp_path, WATCH + "[images]\n")
    assert [line.split(":")[0] for line in both] == ["images"]


MIXED = """
    labels = ["a", "b"]
    [modalities.watch]
    data = "watch"
    [modalities.watch.series]
    columns = ["ax", "ay"]
    [modalities.photos]
    data = "photos"
    model = "vit"
    [modalities.photos.images]
"""


def test_a_job_may_have_several_modalities(tmp_path: Path) -> None:
    wanted = load(tmp_path, MIXED + "[space]\nwidth = 16\n")
    assert wanted.modalities["watch"].series == Series(columns=("ax", "ay")) and wanted.space.width == 16
    assert wanted.modalities["photos"] == Modality(data="photos", model="vit", images=Images())
    assert wanted.on_features and wanted.data_sets == ("watch", "photos") and checked(wanted) == wanted


def test_what_does_not_go_with_modalities_is_said_at_once(tmp_path: Path) -> None:
    before = 'model = "minilm"\ndata = "notes"\nmode = "split"\nsecure = true\n'
    found = problems(tmp_path, before + MIXED.replace("labels", "#") + "[privacy]\nepsilon = 1\n[adapter]\nrank = 2\n")
    said = ["model: not beside", "data: not beside", "privacy: not with modalities", "secure: not with modalities",
            "labels: missing", "mode: 'split'", "adapter: means nothing"]  # fmt: skip
    assert all(any(line.startswith(word) for line in found) for word in said), found
    assert problems(tmp_path, MIXED.replace('"ay"', '"ax"')) == [
        "modalities.watch.series.columns: one is named twice, or is label, id or time as well"
    ]
    assert problems(tmp_path, MIXED.replace('model = "vit"', "")) == [
        "modalities.photos.model: missing; a net that takes pictures"
    ]
    wrong = problems(tmp_path, MIXED.replace("columns", "colums") + "poool = 3\n[modalities.x]\n")
    assert sorted(line.split(":")[0] for line in wrong) == [
        "modalities.photos.images.poool", "modalities.watch.series.columns", "modalities.watch.series.colums",
        "modalities.x.data",
    ]  # fmt: skip
    one = MIXED[: MIXED.index("[modalities.photos]")]
    assert problems(tmp_path, one) == ["modalities: 1; 2 to 8 of them share a space"]
    assert problems(tmp_path, WATCH + "[space]\nwidth = 3\n") == ["space: means something with modalities alone"]


PLANNED = (
    MIXED
    + """
    [space]
    anchors = "minilm"
    [[plan]]
    modules = ["connector.watch", "connector.photos"]
    objective = "contrastive"
    last = 3
    [[plan]]
    modules = ["head"]
    devices = ["pi4"]
    every = 2
    [[plan]]
    modules = ["connector.photos"]
    first = 4
"""
)


def test_a_plan_says_what_modules_are_trained_for(tmp_path: Path) -> None:
    wanted = load(tmp_path, PLANNED)
    assert checked(wanted) == wanted and wanted.space.anchors == "minilm"
    assert [planned.objective for planned in wanted.plan] == ["contrastive", "task", "task"]
    active = [[planned.at(number) for planned in wanted.plan] for number in range(6)]
    assert active == [
        [True, True, False], [True, False, False], [True, True, False], [True, False, False], [False, True, True],
        [False, False, True],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"head"', '"connector.phone"'), "plan.1.modules: no module connector.phone; there are"),
        (("first = 4", "first = 3"), "plan: connector.photos is trained for two objectives in round 3"),
        (('"head"', '"head", "head"'), "plan.1.modules: one is listed twice"),
        (('anchors = "minilm"', ""), "space.anchors: missing"),
        (('"contrastive"', '"task"'), "space.anchors: and temperature mean something with"),
        (("last = 3", 'last = 2\n[rounds]\ncount = 4\n[[x]]'), "x: no such key"),
        (("first = 4", "first = 10"), "plan.2: is for none of the rounds 0 to 9"),
        (('"pi4"', '"Pi 4"'), "plan: 'Pi 4' is no name"),
        (('"head"', '"tail"'), "plan.1.modules: Expected `str` matching regex"),
        (('["connector.watch", "connector.photos"]', '["head"]'), "plan.0.modules: head has nothing to do with"),
        (("every = 2", "every = 0"), "plan.1.every: Expected `int` >= 1"),
    ],
)  # fmt: skip
def test_a_plan_that_can_t_be_kept_is_refused(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    found = problems(tmp_path, PLANNED.replace(*change))
    assert any(line.startswith(said) for line in found), found


def test_each_round_trains_something(tmp_path: Path) -> None:
    gap = MIXED + '[[plan]]\nmodules = ["head"]\nevery = 2\n'
    assert problems(tmp_path, gap) == ["plan: nothing is trained in round 1"]
    assert problems(tmp_path, SMALL + '[[plan]]\nmodules = ["head"]\n') == [
        "plan: means something with modalities alone"
    ]
