"""Whether a parcel holds rows for a stage, or a request that it can serve."""

from __future__ import annotations

from typing import Any

import numpy as np

from wire.coding import coder
from wire.errors import MalformedFrame
from wire.frames import Dtype, Tensor
from wire.messages import RequestMeta, StageOrder


def checked_rows(order: StageOrder, tensor: Tensor, many: bool, of_answers: bool = False) -> tuple[Any, str]:
    """The rows as the engine wants them, or what is wrong with them. `many` token ids may come with meta only. Several
    rows are a chunk of a prompt, unless they are `of_answers`."""
    if order.embedding:
        if tensor.dtype is not Dtype.I32 or len(tensor.shape) != 1:
            return None, f"token ids as {tensor.dtype.name} {tensor.shape}, they are I32 [n]"
        ids = tensor.array()
        least, most = (int(ids[0]),) * 2 if len(ids) == 1 else (int(ids.min()), int(ids.max()))
        if least < 0 or most >= order.vocabulary:
            return None, f"a token id is not in 0 to {order.vocabulary - 1}"
        if len(ids) > 1 and not many:
            return None, "more than one token without meta"
        return ids.astype(np.int64), ""
    codec = order.row_codec_in if of_answers or tensor.shape[0] == 1 else order.codec_in
    try:
        return coder(codec, order.wire_dtype, order.hidden).decode(tensor), ""
    except MalformedFrame as error:
        return None, error.message


def unfit_request(order: StageOrder, meta: RequestMeta, tensor: Tensor | None) -> tuple[str, str]:
    """Why a request that begins can't be served: the code of a StageError and a text; '' and '' if it can."""
    if order.embedding and tensor is not None and tensor.shape[0] != meta.prompt_tokens:
        return "protocol", f"meta says {meta.prompt_tokens} prompt tokens, {tensor.shape[0]} came"
    if meta.replay_tokens >= meta.prompt_tokens:
        return "protocol", f"{meta.replay_tokens} rows to replay of a prompt of {meta.prompt_tokens}"
    if meta.prompt_tokens > order.context_tokens:
        room = f"the deployment holds {order.context_tokens} per request"
        return "too-long", f"{meta.prompt_tokens} prompt tokens, {room}"
    if meta.padded and not meta.speculate:
        return "protocol", "steps of two rows and no guess for the second"
    if meta.padded and (meta.prompt_tokens < 2 or meta.replay_tokens):
        return "protocol", "steps of two rows, and a row of the prompt alone"
    if meta.padded and meta.prompt_tokens + meta.max_new_tokens > order.context_tokens:
        return "too-long", f"no room for a second row: the deployment holds {order.context_tokens} tokens per request"
    return "", ""
