"""Control messages: frozen msgspec structs, JSON on the wire, versioned, capped.

Every message carries `v`. A reader takes any message of its own major version and ignores fields it does not know;
a message of another version, a wrong type or a number out of range is a PeerError that names topic and field.
Field names end in their unit. Times named `*_unix` are for people; decisions use monotonic time.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from wire import ids, limits
from wire.errors import PeerError
from wire.factors import Begins, OwnRound
from wire.modalities import ByModality, Connected, Objective
from wire.privacy import Privacy
from wire.samples import Images, Series
from wire.shares import Share, Turn
from wire.version import PROTOCOL

Name = ids.Name
Digest = ids.Digest
Text = Annotated[str, Meta(max_length=4096)]
Topic = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
BootId = Annotated[str, Meta(pattern=r"^[0-9a-f]{1,32}$")]

Runs = Literal["tokens", "items", "rounds"]
"""What a stage is worked with: requests that it keeps rows of, items of which it keeps nothing, or rounds of a job."""

CodecName = Literal["as-is", "f16", "bf16", "int8-group", "int8-token"]
"""In which form hidden states cross a cut: wire.codecs."""


class Message(Struct, frozen=True, kw_only=True, omit_defaults=False):
    v: int = PROTOCOL


class DeviceState(Message, frozen=True, kw_only=True):
    state: Literal["online", "busy", "draining", "offline"]
    boot: BootId
    since_unix: float
    reason: Text = ""


class EngineInfo(Struct, frozen=True, kw_only=True):
    """`version` is '' when the engine can't be used; `because` then says why."""

    name: str
    version: str = ""
    because: Text = ""


class DeviceInfo(Message, frozen=True, kw_only=True):
    device: Name
    boot: BootId
    software: str
    board: Text
    arch: str
    os: Text
    python: str
    cores: Annotated[float, Meta(gt=0, le=4096)]
    """Processors the agent may use: affinity and quota counted (0.25 is a quarter of one)."""
    cores_because: Text
    memory_bytes: Count
    """Memory the agent may use: limits counted."""
    memory_because: Text
    engines: Annotated[tuple[EngineInfo, ...], Meta(max_length=16)]
    addresses: Annotated[tuple[str, ...], Meta(max_length=16)] = ()
    cache_bytes: Count = 0
    data_broker: Annotated[str, Meta(max_length=256)] = ""
    """URL of the board's own broker for activations, '' if it has none; `data_broker_because` says what or why not."""
    data_broker_because: Text = ""
    emulated: Text = ""
    """Not '' on a virtual board: what is emulated, in words."""
    data: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    """Names of what it may be trained on. The data itself stays there."""
    private_data: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    """Those of them that private jobs alone may use."""
    knows_split: bool = False
    """Whether it can have a part of a model that is trained: older software refuses all orders with such a one."""
    knows_features: bool = False
    """Whether it can train a task module on other samples than texts: older software refuses such orders."""
    knows_privacy: bool = False
    """Whether it does what `TrainingTask.privacy` asks for: older software overlooks it."""
    knows_private_split: bool = False
    """The same with the ends of a model that is split."""
    told_states: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    """Those of `private_data` whose states may leave the board, which no noise covers."""
    knows_secure: bool = False
    """Whether it can do what `TrainingTask.secure` asks for."""
    knows_looped: bool = False
    """Whether it can be a hub or a shard, as `knows_split`."""
    knows_own: bool = False
    """Whether it does what `TrainingTask.begins` asks for: older software overlooks it."""
    knows_modalities: bool = False
    """Whether it does what `TrainingTask.connected` asks for: older software overlooks it."""


class ArtifactRef(Struct, frozen=True, kw_only=True):
    """A file known by its content; fetched from the coordinator's HTTP API as /v1/artifacts/<digest>."""

    digest: Digest
    size_bytes: Annotated[int, Meta(ge=0, le=limits.MAX_ARTIFACT_BYTES)]
    name: Annotated[str, Meta(max_length=128)] = ""


class InboxAddress(Struct, frozen=True, kw_only=True):
    """Where frames for somebody go. `broker` '' means the broker that the control connection uses."""

    topic: Topic
    broker: Annotated[str, Meta(max_length=256)] = ""


EngineName = Literal["tensorrt", "onnxruntime-cuda", "onnxruntime", "torch-cuda", "torch"]
"""What can compute a stage (models.engine.choice)."""

Label = Annotated[str, Meta(min_length=1, max_length=64)]
"""Of a text."""

Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""Matrices of a block that can have low-rank factors."""


Role = Literal["whole", "ends", "trunk", "hub", "shard"]
"""What of a model a device trains with: all of it; what goes before the blocks and behind them, with data; or all
blocks, for devices that have the ends, without any data. Of one block that stands at every depth: a share of its
matrices, or what is left, and sums them up."""


class TrainingTask(Struct, frozen=True, kw_only=True):
    """What a device does in each round of a job: so many steps of AdamW on the factors, from those that it is sent.

    The factors of all matrices of a block, A [rank, in] and B [out, rank], blocks in order, travel as one vector of
    float32; the product B A counts by `alpha` / `rank`.
    """

    data: Name
    """Name of a data set in the device's own settings."""
    tokenizer: ArtifactRef | None
    """tokenizer.json of the model; None where samples are no texts."""
    end_id: Annotated[int, Meta(ge=0, lt=limits.MAX_DIM)] | None = None
    """The token that ends a text."""
    rank: Annotated[int, Meta(ge=1, le=limits.MAX_ADAPTER_RANK)]
    alpha: Annotated[float, Meta(gt=0, le=1e6)]
    matrices: Annotated[tuple[Matrix, ...], Meta(min_length=1, max_length=7)]
    row_tokens: Annotated[int, Meta(ge=2, le=limits.MAX_PROMPT_TOKENS)]
    """Of a sample; what is longer is cut."""
    batch_rows: Annotated[int, Meta(ge=1, le=4096)]
    steps: Annotated[int, Meta(ge=1, le=1_000_000)]
    learning_rate: Annotated[float, Meta(gt=0, le=10)]
    most_norm: Annotated[float, Meta(gt=0, le=1e9)]
    """Of a step's gradient; what is longer is shortened to it."""
    held_out: Annotated[float, Meta(ge=0, lt=1)]
    """Share of the samples that is never trained on."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    """Of the job: what the budget has to last for."""
    privacy: Privacy | None = None
    remember: bool = True
    """Whether blocks keep what their gradients need; else it is computed again, for a device of little memory. The
    result is the same."""
    rows_at_once: Annotated[int, Meta(ge=1, le=4096)] = 4096
    """Samples of a step whose gradients are made at one time; they are added up, to the same but for rounding."""
    labels: Annotated[tuple[Label, ...], Meta(max_length=limits.MAX_LABELS)] = ()
    """Which of these a text has is learnt, by an encoder with a task module; none: to say the text itself. The graph of
    such an order is the encoder's configuration, and the task module travels behind the factors."""
    series: Series | None = None
    """Samples are windows of readings, and the task module alone is trained, on features of these."""
    images: Images | None = None
    """The same of pictures; the graph and its weights then are of the net that makes features of them."""
    connected: Connected | None = None
    """The same of samples of several modalities, whose features connectors map into one space."""
    role: Role = "whole"
    blocks: bool = False
    """All weights of all blocks are trained instead of factors, of an encoder."""
    last_only: bool = False
    """The last block alone has factors."""
    uplink_grad: Literal["cut", "lowrank"] = "cut"
    """Gradients that ends send: by features; or by the last matrix's A x, and by its B (models.training.lowrank)."""
    refuse_bad_rows: bool = False
    """Data with a row that is no sample are not trained on at all; else it is left out and counted."""
    secure: bool = False
    """Updates leave the device masked alone, for a sum (SecureMeta); its UPDATE says that there is one."""
    share: Share | None = None
    """Of a shard."""
    begins: Begins = "shared"


class StageOrder(Struct, frozen=True, kw_only=True):
    """One stage that a device shall hold. Blocks are [first_block, end_block)."""

    deployment: Name
    epoch: Count
    stage: Annotated[int, Meta(ge=0, lt=1024)]
    stages: Annotated[int, Meta(ge=1, le=1024)]
    model: Text
    engine: EngineName
    graph: ArtifactRef
    weights: Annotated[tuple[ArtifactRef, ...], Meta(max_length=4096)]
    embedding: bool
    head: bool
    first_block: Count
    end_block: Count
    hidden: Annotated[int, Meta(ge=1, le=limits.MAX_DIM)]
    vocabulary: Annotated[int, Meta(ge=1, le=limits.MAX_DIM)]
    wire_dtype: Literal["f32", "f16", "bf16"]
    context_tokens: Annotated[int, Meta(ge=limits.LEAST_CONTEXT_TOKENS, le=limits.MAX_PROMPT_TOKENS)]
    slots: Annotated[int, Meta(ge=1, le=limits.MAX_LIVE_REQUESTS)]
    prefill_chunk_tokens: Annotated[int, Meta(ge=2, le=4096)]
    inbox: InboxAddress
    next: InboxAddress
    """Inbox of the next stage in the ring; the head's next is the first stage."""
    codec_in: CodecName = "as-is"
    """Of the chunks of prompts that come; means nothing where token ids do."""
    codec_out: CodecName = "as-is"
    """Of those that go to the next stage; means nothing for the head."""
    row_codec_in: CodecName = "as-is"
    """Of the single rows of answers (one, or one of each of several requests)."""
    row_codec_out: CodecName = "as-is"
    config: Annotated[str, Meta(max_length=65536)] = ""
    """JSON of the family's configuration, for engines that build their own graph (torch)."""
    runs: Runs = "tokens"
    standby: bool = False
    """A second copy: loaded and warm, with an inbox of its own to which nobody sends. It makes no steps until a later
    order puts it in its stage's place (docs/decisions/0013-replicas.md)."""
    standard_graph: ArtifactRef | None = None
    """The same stage in operators of ONNX alone, for engines that know no others."""
    training: TrainingTask | None = None
    """With rounds."""


class Desired(Message, frozen=True, kw_only=True):
    device: Name
    epoch: Count
    """Grows with every change; a device ignores a lower one than it has applied."""
    artifacts_url: Annotated[str, Meta(max_length=512)]
    stages: Annotated[tuple[StageOrder, ...], Meta(max_length=64)]


class StageReport(Struct, frozen=True, kw_only=True):
    deployment: Name
    epoch: Count
    stage: Count
    phase: Literal["waiting", "fetching", "loading", "ready", "failed", "stopping"]
    detail: Text = ""
    fetched_bytes: Count = 0
    to_fetch_bytes: Count = 0
    held_bytes: Count = 0
    """Weights, KV cache and buffers of the stage."""
    resident_bytes: Count = 0
    """Memory of the worker process as the kernel counts it."""
    restarts: Count = 0
    standby: bool = False
    """Of a copy that waits to take the stage's place."""
    engine: Text = ""
    """What it runs on, as the engine says itself; '' while it is not loaded."""
    fell_back: Text = ""
    """Why it is not the engine that was ordered; '' if it is."""


class Applied(Message, frozen=True, kw_only=True):
    device: Name
    boot: BootId
    epoch: Count
    stages: Annotated[tuple[StageReport, ...], Meta(max_length=64)] = ()
    refused_epoch: Count = 0
    """Epoch of a Desired that came after the one applied and was not taken; 0 when there is none."""
    refused_because: Text = ""


class StepMark(Struct, frozen=True, array_like=True):
    """When a step over a row of an answer was made, by the board's own clock. Stages mark the same rows, so that
    what lies between them can be told (coordinator.laps)."""

    request: Count
    """The lower bits of its number."""
    row: Count
    began_s: Seconds
    ended_s: Seconds
    back_s: Seconds = 0.0
    """At the first stage: when its next step for this answer began, for which the token had to come back."""


class StageCounters(Struct, frozen=True, kw_only=True):
    """Totals since the worker took this epoch, so that a figure of an answer has nothing of another plan in it; of
    `sent_frames`, `sent_bytes` and `received_bytes` since it started. `*_bytes` are payload bytes at the transport."""

    deployment: Name
    epoch: Count
    stage: Count
    requests: Count = 0
    prefill_steps: Count = 0
    prefill_tokens: Count = 0
    prefill_busy_s: Seconds = 0.0
    decode_steps: Count = 0
    decode_rows: Count = 0
    """Tokens: a decode step runs one row of each request in a group."""
    decode_busy_s: Seconds = 0.0
    decode_rows_run: Count = 0
    """Rows that decode steps ran, those of wrong guesses too."""
    decode_context_tokens: Count = 0
    """Rows in the KV cache before the step of each of these, added up: a step takes longer with more of them."""
    sent_frames: Count = 0
    sent_bytes: Count = 0
    decode_sent_bytes: Count = 0
    """The part of `sent_bytes` that decode steps sent to the next stage (tokens to the requester not counted)."""
    drafts_sent: Count = 0
    """Tokens that the first stage guessed for steps."""
    drafts_accepted: Count = 0
    """Those of them that were drawn."""
    received_bytes: Count = 0
    refused_frames: Count = 0
    resident_bytes: Count = 0
    live: Count = 0
    """Requests that hold a slot now; no total."""
    marks: Annotated[tuple[StepMark, ...], Meta(max_length=32)] = ()
    """The last ones."""
    engine: Annotated[str, Meta(max_length=256)] = ""
    """What makes the steps, as the engine says itself."""


class Telemetry(Message, frozen=True, kw_only=True):
    seq: Count
    boot: BootId
    mono_s: Seconds
    cpu_fraction: Annotated[float, Meta(ge=0, le=4096)]
    """Processor time used by the agent and its workers in the last period, in cores."""
    memory_used_bytes: Count
    memory_bytes: Count
    temperature_c: float | None = None
    stages: Annotated[tuple[StageCounters, ...], Meta(max_length=64)] = ()


class KitModule(Struct, frozen=True, kw_only=True):
    """A module to time. `graphs` holds (number of blocks stacked, graph): times at two depths separate the cost of a
    block from the cost of a step. Weights are made on the device: time does not depend on their values."""

    key: Annotated[str, Meta(max_length=256)]
    kind: Literal["block", "embedding", "head"]
    graphs: Annotated[tuple[tuple[int, ArtifactRef], ...], Meta(max_length=8)]
    standard: Annotated[tuple[tuple[int, ArtifactRef], ...], Meta(max_length=8)] = ()
    """The same in operators of ONNX alone, for engines that know no others."""
    hidden: Annotated[int, Meta(ge=1, le=limits.MAX_DIM)]
    vocabulary: Annotated[int, Meta(ge=1, le=limits.MAX_DIM)]
    wire_dtype: Literal["f32", "f16", "bf16"]
    runs: Runs = "tokens"


class Kit(Message, frozen=True, kw_only=True):
    artifacts_url: Annotated[str, Meta(max_length=512)]
    modules: Annotated[tuple[KitModule, ...], Meta(max_length=64)]


class Command(Message, frozen=True, kw_only=True):
    id: Annotated[str, Meta(max_length=64)]
    reply_topic: Topic
    arguments: dict[str, Any] = {}


class Reply(Message, frozen=True, kw_only=True):
    id: Annotated[str, Meta(max_length=64)]
    device: Name
    ok: bool
    error: Text = ""
    result: dict[str, Any] = {}


class Event(Message, frozen=True, kw_only=True):
    """A notice for people. `code` is a row of the notices table; `try_` is what to do."""

    who: Name
    code: Annotated[str, Meta(max_length=64)]
    level: Literal["info", "warning", "error"]
    text: Text
    try_: Text = ""
    at_unix: float


class Sampling(Struct, frozen=True, kw_only=True):
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=limits.MAX_DIM)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class RequestMeta(Struct, frozen=True, kw_only=True):
    """Rides in front of the first parcel of a request from stage to stage, so that every stage knows it in order."""

    reply: InboxAddress
    sampling: Sampling
    prompt_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_PROMPT_TOKENS)]
    max_new_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_PROMPT_TOKENS)]
    stop_ids: Annotated[tuple[int, ...], Meta(max_length=64)] = ()
    idle_timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 60.0
    """A stage frees the request's slot when nothing came for so long."""
    replay_tokens: Annotated[int, Meta(ge=0, lt=limits.MAX_PROMPT_TOKENS)] = 0
    """So many tokens at the end of the prompt are run one by one: they were an answer's, and must be computed as they
    were then."""
    alone: bool = False
    """No row of it shares a step with rows of other requests: how many share it shows in the last bits."""
    speculate: Annotated[int, Meta(ge=0, le=limits.MAX_DRAFTS)] = 0
    """Most tokens that the first stage may guess for a step; 0: none."""
    padded: bool = False
    """Every step of it has two rows or more, so that what was given can be computed again as a prompt."""
    adapter: Annotated[str, Meta(pattern=limits.ADAPTER_ID_OR_NONE)] = ""
    """Of those that the deployment serves; '' is none."""


class StageTime(Struct, frozen=True, array_like=True):
    """What an item took at a stage."""

    busy_s: Seconds
    """In the engine."""
    sent_bytes: Count
    """Payload that went on, header and meta not counted."""


class ItemMeta(Struct, frozen=True, kw_only=True):
    """Rides in front of an item from stage to stage, and in front of what comes out to the requester."""

    reply: InboxAddress
    rows: Annotated[int, Meta(ge=1, le=limits.MAX_DIM)]
    stages: Annotated[tuple[StageTime, ...], Meta(max_length=128)] = ()
    """Of the stages that it went through."""


class Peer(Struct, frozen=True, kw_only=True):
    """Another device of a round in which a model is split."""

    device: Name
    inbox: InboxAddress


class SplitRound(Struct, frozen=True, kw_only=True):
    """With whom a device makes a round, of a job that splits the model."""

    session: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    """Another one each time that a round is begun anew: all that devices say to each other in it has this as its
    request, and what has another is dropped."""
    segments: Annotated[tuple[Peer, ...], Meta(min_length=1, max_length=limits.MAX_SEGMENTS)]
    """Who has the trunk's blocks, in their order."""
    place: Annotated[int, Meta(ge=0, lt=limits.MAX_SEGMENTS)] | None = None
    """Of the one who is asked, among them; None: it has the ends."""
    ends: Annotated[tuple[Peer, ...], Meta(max_length=limits.MAX_ENDS)] = ()
    """For the trunk: all that have the ends."""
    patience_s: Annotated[float, Meta(gt=0, le=1e6)] = 60.0
    """After which the trunk names whom it waits for."""
    shards: Annotated[tuple[Peer, ...], Meta(max_length=limits.MAX_SEGMENTS)] = ()
    """For a hub, which is the one segment then; `place` of a shard is among these."""


class SplitMeta(Struct, frozen=True, kw_only=True):
    """Rides in front of what devices say to each other in such a round."""

    device: Name
    """Whose batch it is of, who has the ends."""
    place: Annotated[int, Meta(ge=0, lt=limits.MAX_SEGMENTS)] | None = None
    """Of the segment that says it; None: the device itself does."""
    step: Count
    judged: bool = False
    """Of what is held out: no gradient follows."""
    samples: Count = 0
    """With STATES: that the device has to train on; its weight among the others."""
    lengths: Annotated[tuple[Count, ...], Meta(max_length=limits.MAX_SPLIT_ROWS)] = ()
    """With STATES: rows of each text."""
    square: Annotated[float, Meta(ge=0)] | None = None
    """Of a step's gradients, summed over the segments behind, with the last GRADIENT from one segment to another; over
    all with STEP."""
    turn: Turn | None = None
    """With SHARE and PARTIAL."""


class RoundMeta(Struct, frozen=True, kw_only=True):
    """Rides in front of the factors that a round begins with, to each device that takes part."""

    reply: InboxAddress
    round: Count
    parts: Annotated[tuple[Literal["a", "b", "w", "c"], ...], Meta(min_length=1, max_length=4)]
    """Which factors are trained and sent back, 'w': weights, 'c': the task module; the others stay as they came."""
    train: bool = True
    """False: only the loss on what is held out is asked for."""
    bytes_per_s: Annotated[float, Meta(gt=0, le=1e12)] | None = None
    """How fast to send the update: the device's share of a medium. None: as fast as goes."""
    split: SplitRound | None = None
    """With a role that is not 'whole'."""
    own: OwnRound = -1
    objectives: Annotated[tuple[Objective, ...], Meta(max_length=limits.MAX_OBJECTIVES)] = ()
    """Of a job of several modalities: their modules alone are trained and sent back."""


class UpdateMeta(Struct, frozen=True, kw_only=True):
    """Rides in front of what a device made of the factors: those of the parts that the round asked for."""

    round: Count
    device: Name
    samples: Count
    """That it has to train on; its weight among the others."""
    bad_rows: Count = 0
    """Of its data, left out since they are no samples."""
    loss: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """Mean over the round's steps, in nats per token or label; None where nothing was trained."""
    held_out_loss: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """Of the factors that came, before any step; None where nothing is held out."""
    held_out_count: Count = 0
    held_out_right: Count | None = None
    """Tokens, or texts with a label, that this is the mean over; labels among them that were told right."""
    compute_s: Seconds = 0.0
    noise: Annotated[float, Meta(ge=0, le=1e12)] | None = None
    """Multiplier of the noise that is on it; None: none is."""
    epsilon: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """What the job has spent on this device."""
    peer_sent_bytes: Count = 0
    """Tensors that went to other devices in the round."""
    peer_got_bytes: Count = 0
    """That came from them."""
    own_s: Annotated[dict[Name, Seconds], Meta(max_length=limits.MAX_ENDS)] = {}
    """Of who hears the states of devices with data first: how long each took by itself."""
    by_modality: ByModality = {}
    """Of a job of several: what of `samples` and of the labels held out is of each."""


class Inquiry(Struct, frozen=True, kw_only=True):
    """Body of an INQUIRY parcel. A stage of whatever epoch answers it, between two steps."""

    reply: InboxAddress
    number: Count


class Standing(Struct, frozen=True, kw_only=True):
    """Body of a STANDING parcel: how a request stands at a stage."""

    stage: Count
    number: Count
    """Of the inquiry that this answers."""
    known: bool
    filed: Count = 0
    """Rows of it that came."""
    run: Count = 0
    """Rows of it that were run."""
    waiting: bool = False
    """Whether something of it waits here, for its step or to be sent."""


class StageError(Struct, frozen=True, kw_only=True):
    """Body of an ERROR parcel to the requester."""

    stage: Count
    device: Name
    code: Literal["busy", "too-long", "engine", "protocol", "deadline", "stopped", "again"]
    """'again': what was under way is lost, and begins anew when it is asked for again."""
    text: Text
    shard: Annotated[int, Meta(ge=0, lt=limits.MAX_SEGMENTS)] | None = None
    """Whose fault it is, of a hub's shards; None: that of `device`."""


M = TypeVar("M", bound=Struct)


def encode(message: Struct) -> bytes:
    """JSON bytes of a message; raise ValueError if it is larger than MAX_CONTROL_BYTES (our own fault)."""
    data = msgspec.json.encode(message)
    if len(data) > limits.MAX_CONTROL_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(data)} bytes exceeds {limits.MAX_CONTROL_BYTES}")
    return data


def decode(data: bytes | memoryview, kind: type[M], where: str) -> M:
    """Parse and check a message; raise PeerError naming `where` and the field."""
    if len(data) > limits.MAX_CONTROL_BYTES:
        raise PeerError(f"{where}: {len(data)} bytes, at most {limits.MAX_CONTROL_BYTES} are taken")
    try:
        message = msgspec.json.decode(data, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PeerError(f"{where}: not a {kind.__name__}: {error}") from None
    version = getattr(message, "v", PROTOCOL)
    if version != PROTOCOL:
        raise PeerError(
            f"{where}: speaks protocol {version}, this is {PROTOCOL}",
            try_="install the same edgelam version on coordinator and boards",
        )
    return message
