"""Caps on everything that a peer controls. Checked before memory is allocated.

Sizes in bytes, times in seconds. A number without a comment would be a guess, so each has its reason.
"""

from typing import Final

MAX_PUBLISH_BYTES: Final = 1_048_576
"""Largest MQTT payload we send or accept: above it mosquitto costs 4-5 times more per byte (docs/transport.md)."""

CHUNK_BYTES_DEFAULT: Final = 65_536
"""Payload of one frame on links of unknown or up to 100 Mbit/s: store-and-forward then nearly vanishes."""

CHUNK_BYTES_FAST: Final = 262_144
"""Payload of one frame on links measured at 500 Mbit/s or more."""

MAX_TENSOR_BYTES: Final = 64 * 1024 * 1024
"""Largest tensor that is reassembled: 4096 tokens x 4096 wide x 4 bytes. A header that announces more is refused."""

MAX_RANK: Final = 4
MAX_DIM: Final = 1 << 24
MAX_CHUNKS: Final = 4096

MAX_META_BYTES: Final = 16_384
"""JSON that may ride in front of a tensor (sampling parameters, reply address)."""

MAX_PARTIAL_TENSORS: Final = 64
"""Tensors in reassembly at one time, over all senders of one inbox."""

MAX_PARTIAL_BYTES: Final = 128 * 1024 * 1024
"""Bytes that tensors in reassembly may hold, over all senders of one inbox."""

PARTIAL_TIMEOUT_S: Final = 30.0
"""A tensor whose chunks stop coming is dropped after this."""

MAX_SENDERS: Final = 64
"""Streams one inbox keeps state for; the longest silent one is forgotten first."""

CREDIT_WINDOW_BYTES: Final = 1_048_576
"""Bytes one sender may have outstanding: twice bandwidth x round trip of 1 Gbit/s x 4 ms, and far below what a broker
holds for a stalled client before it drops silently (64 messages)."""

MAX_WINDOW_BYTES: Final = 64 * 1024 * 1024
"""Largest credit window an inbox may give one sender; a grant further ahead is no honest one and is ignored."""

MAX_HELD_BYTES: Final = 128 * 1024 * 1024
"""Bytes of whole parcels that wait in one inbox, over all senders."""

CREDIT_ASK_S: Final = 0.5
"""A sender that is blocked for so long asks for its credit again: longer than a grant takes on any link we serve."""

MAX_BACKLOG_BYTES: Final = 16 * 1024 * 1024
"""Bytes a sender queues while it has no credit; more is an error for whoever produces them. One parcel that is larger
than this alone may be queued when nothing else is."""

MAX_CONTROL_BYTES: Final = 262_144
"""Largest JSON control message."""

MAX_ADAPTER_RANK: Final = 256
"""Of factors that a job trains: beyond it the whole matrix is as cheap."""

MAX_ENDS: Final = 48
"""Devices that train with one trunk: a worker answers so many, and their names fit into a message."""
MAX_SEGMENTS: Final = 32
"""Devices that have the blocks of one trunk."""
MAX_SPLIT_ROWS: Final = 1024
"""Samples of a batch whose states travel."""
LEAST_SUMMED: Final = 3
"""Members of a sum that is all that is learnt of their updates: of two each could tell the other's."""
MAX_SUMMED: Final = 48
"""The same: each makes a mask with each other, and their names fit into a message."""
MAX_LABELS: Final = 1024
"""That a text may have one of."""

MAX_SERIES_COLUMNS: Final = 64
"""Of sensor readings that are looked at together."""
LEAST_SERIES_WINDOW: Final = 9
"""Rows: what one kernel spans (models.training.kernels)."""
MAX_SERIES_WINDOW: Final = 16_384
MAX_WINDOW_READINGS: Final = 1 << 17
"""Of all columns of a window: 0.5 MB, and twenty times that while its features are computed."""
MAX_FEATURES: Final = 16_384
"""That a task module without an encoder of its own looks at."""
MAX_PIXELS: Final = 100_000_000
"""Of a picture that is decoded: 300 MB, and twice that on the way."""
MAX_SAMPLES_KEPT: Final = 1_000_000
"""Whose features a board keeps in memory."""

MAX_MODALITIES: Final = 8
"""Of one job, each with a module of its own."""
MAX_WIDTH: Final = 4096
"""Of the space that modalities share."""
MAX_OBJECTIVES: Final = 16
"""Of one job: no module has two at one time."""

MAX_ADAPTERS: Final = 8
"""That one deployment serves: each costs every step a little."""

ADAPTER_ID: Final = r"^[0-9a-f]{32}$"
ADAPTER_ID_OR_NONE: Final = r"^([0-9a-f]{32})?$"

LEAST_CONTEXT_TOKENS: Final = 2
"""One token of a prompt and one of an answer."""

MAX_DRAFTS: Final = 7
"""Tokens guessed for one step: with the one before them eight rows, which cost a small board three steps of one."""

MAX_PROMPT_TOKENS: Final = 131_072
MAX_LIVE_REQUESTS: Final = 256
MAX_DEVICES: Final = 256

MAX_TXT_BYTES: Final = 400
"""mDNS TXT in total, so that the record stays in one Ethernet frame."""

MAX_ARTIFACT_BYTES: Final = 64 * 1024 * 1024 * 1024
MAX_GGUF_METADATA_BYTES: Final = 256 * 1024 * 1024
MAX_SAFETENSORS_HEADER_BYTES: Final = 100 * 1024 * 1024

CONTROL_KEEPALIVE_S: Final = 2
"""Keepalive of a supervisor's control connection: a vanished host is known after 3-5 s."""

DATA_KEEPALIVE_S: Final = 30
"""Keepalive of a worker's data connection: a long prefill step must not look like death; deadlines catch the rest."""

TRAINING_KEEPALIVE_S: Final = 300
"""The same of a worker that trains: as long as its supervisor bears that it says nothing."""

HEARTBEAT_PERIOD_S: Final = 1.0
SUSPECT_AFTER_S: Final = 2.5
OFFLINE_AFTER_S: Final = 6.0
RECONNECT_DELAY_S: Final = 1.0
"""Fixed reconnect delay: paho's default backoff reaches 120 s."""

MIN_DEADLINE_S: Final = 0.25

LEAST_SUSTAINED_S: Final = 5.0
MOST_SUSTAINED_S: Final = 1800.0
"""For how long a board can be told to make steps without a pause: what is shorter warms nothing, and half an hour is
enough for any heat sink."""
