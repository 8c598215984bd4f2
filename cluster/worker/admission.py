"""What a decode worker takes: how much at once, and which dispatches make sense."""

from __future__ import annotations

import numpy as np

from cluster.types import Dispatch, WorkerInfo
from cluster.worker.decode_request import TOKEN_BYTES

PLACES_PER_ROW = 2


def decode_capacity(info: WorkerInfo) -> int:
    """Choices that a decode worker takes at once: a full batch, and as many whose prompts are computed or pulled.

    Those hold KV blocks and no row, so a batch stays full although each request spends some of its time elsewhere.
    """
    return PLACES_PER_ROW * info.max_num_seqs


def dispatch_trouble(dispatch: Dispatch, info: WorkerInfo) -> tuple[str, str] | None:
    """What the router should have caught, as (code, message): a bad id or length would take the rank down, and with it
    everybody's requests.
    """
    parts = [dispatch.prompt, *(choice.outputs for choice in dispatch.choices)]
    if not dispatch.prompt or not dispatch.choices or any(len(part) % TOKEN_BYTES for part in parts):
        return "invalid_value", "The prompt is empty or malformed."
    if len({choice.index for choice in dispatch.choices}) != len(dispatch.choices):
        return "invalid_value", "Two choices have the same index."
    ids = np.frombuffer(b"".join(parts), dtype="<u4")  # a negative id is a huge one
    if int(ids.max()) >= (info.vocab_size or 1 << 31):
        return "invalid_value", "A token id is outside the vocabulary."
    longest = max(len(dispatch.prompt) + len(choice.outputs) for choice in dispatch.choices) // TOKEN_BYTES
    if info.max_model_len and longest >= info.max_model_len:
        return "context_length_exceeded", ""
    return None
