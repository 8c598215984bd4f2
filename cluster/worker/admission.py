"""What a decode worker takes: how much at once, and which dispatches make sense."""

from __future__ import annotations

from cluster.types import Dispatch, WorkerInfo
from cluster.worker.decode_request import TOKEN_BYTES
from engine.scheduler.request_state import largest_id

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
    prompt, choices = dispatch.prompt, dispatch.choices
    parts = [prompt, *[choice.outputs for choice in choices if choice.outputs]]
    if not prompt or not choices or [part for part in parts if len(part) % TOKEN_BYTES]:
        return "invalid_value", "The prompt is empty or malformed."
    if len(choices) > 1 and len({choice.index for choice in choices}) != len(choices):
        return "invalid_value", "Two choices have the same index."
    if largest_id(b"".join(parts)) >= (info.vocab_size or 1 << 31):
        return "invalid_value", "A token id is outside the vocabulary."
    longest = (len(prompt) + max(map(len, parts[1:]), default=0)) // TOKEN_BYTES
    if info.max_model_len and longest >= info.max_model_len:
        return "context_length_exceeded", ""
    return None
