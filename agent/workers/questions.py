"""Whether states that came are such as a job's boards send."""

from __future__ import annotations

import numpy as np

from agent.workers.splitwork import Said
from models.privacy.plan import step_rows
from models.training.split import Misled, Question
from wire.messages import StageOrder


def question_of(order: StageOrder, said: Said) -> Question:
    """The states that a device sent, if they can be such; raises Misled."""
    task, meta, states = order.training, said.meta, said.values
    assert task is not None
    lengths = np.array(meta.lengths, np.int64)
    rows, most, hidden = step_rows(task.batch_rows, task.privacy), task.row_tokens, order.hidden
    fits = states.ndim == 3 and 1 <= len(states) <= rows and 1 <= states.shape[1] <= most
    if not fits or states.shape[2] != hidden:
        raise Misled(f"states of {list(states.shape)}, [1-{rows}, 1-{most}, {hidden}] were due", meta.device)
    if len(lengths) != len(states) or lengths.min() < 1 or lengths.max() > states.shape[1]:
        raise Misled("lengths that are none of these rows", meta.device)
    if meta.samples < 1:
        raise Misled("has no samples", meta.device)
    if not np.isfinite(states).all():
        raise Misled("states that are no numbers", meta.device)
    return Question(meta.step, meta.judged, states, lengths)
