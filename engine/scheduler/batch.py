"""The step contract between scheduler and runner: plain data that rank 0 can broadcast.

A request owns a persistent *row* from the step that first schedules it until it ends or is preempted. The runner keeps
per-row state on the device (token table, block table, penalties); a batch carries only what changed.

    tokens of row r:  [ 0 ......... num_computed | query ............. | not scheduled ]
                        KV present                 KV written this step
    The last query token's logits are sampled where `samples[r]`; the new token's position is num_computed + query_len.
    A decode query token may not be known on the host yet (one step in flight): the runner has it in its token table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from engine.request import SamplingParams

IntArray = npt.NDArray[np.int32]


class RowStart(msgspec.Struct, frozen=True, kw_only=True):
    """A request takes (or, after preemption, takes again) a row.

    `token_ids` int32 [n]: prompt, then the outputs known so far. `seed` keys the noise, `choice` is in its counter.
    """

    row: int
    request_id: str
    token_ids: IntArray
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    choice: int = 0


class NewBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks appended to a row's block table from index `first` on. `block_ids` int32 [k]."""

    row: int
    first: int
    block_ids: IntArray


class PromptScore(msgspec.Struct, frozen=True, kw_only=True):
    """Query tokens of a prefill chunk whose next prompt tokens' logprobs are wanted.

    `index` is the row's in the batch; logprobs of prompt tokens [first_position, first_position + count), each from
    the query token before it; `num_top` alternatives.
    """

    index: int
    first_position: int
    count: int
    num_top: int


class ScheduledBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One step. Arrays have one entry per scheduled row, decode rows (query_len 1) first.

    rows, query_lens, num_computed: int32 [R]; samples: bool [R]. `scores`: prompt logprobs that requests asked for.
    `predicted_ms` is how long the scheduler expects the step to take.
    """

    step: int
    starts: tuple[RowStart, ...]
    new_blocks: tuple[NewBlocks, ...]
    rows: IntArray
    query_lens: IntArray
    num_computed: IntArray
    samples: npt.NDArray[np.bool_]
    num_decode_rows: int
    scores: tuple[PromptScore, ...] = ()
    predicted_ms: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Query tokens of the whole step."""
        return int(self.query_lens.sum())


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the model's raw logits: the sampled token's, and the most likely ones."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a step sampled. `token_ids` int32 [R], -1 where nothing was sampled; `logprobs` by index into the batch.

    `prompt_logprobs`, by index into the batch too, has one entry for each count of the batch's `scores`.
    `logits` float32 [R_sampled, V] in batch order is filled only by runners built to capture it (tests).
    """

    step: int
    token_ids: IntArray
    logprobs: dict[int, TokenLogprobs]
    logits: npt.NDArray[np.float32] | None = None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = msgspec.field(default_factory=dict)


class StepHandle(Protocol):
    """A launched step. `wait()` returns its result once, after every kernel of the step has completed."""

    def wait(self) -> StepResult: ...


class Runner(Protocol):
    """What executes batches: engine/runner/model_runner.py, or the exact fake of engine/fake_engine.py."""

    def launch(self, batch: ScheduledBatch) -> StepHandle:
        """Start a step. KV writes of step k are ordered before those of step k + 1."""
        ...

    def checksum_blocks(self, block_ids: IntArray) -> list[int]:
        """64-bit checksums of whole blocks whose kernels have completed, by `checksum_algorithm`."""
        ...

    def checksum_partial(self, block_id: int, num_tokens: int) -> int:
        """Checksum over the first `num_tokens` of a block, bytes in C order of [L, 2, H, num_tokens, D]."""
        ...

    @property
    def checksum_algorithm(self) -> str: ...
