"""Executes scheduled batches with a model: implements the Runner of engine/scheduler/batch.py.

A step, none of whose parts waits for the device between launch() and wait():

    1. deltas        rows that start, blocks appended                            InputBatch.prepare
    2. forward       embed, layers (write K and V, attend, MLP)                  model.hidden
    3. head          rows that sample only: norm, LM head, float32 logits        model.logits
                     (and the positions whose prompt logprobs are wanted         score_prompts)
    4. sample        one token per row, stored in the token table for the next launch
    5. wait()        the step's one synchronisation: tokens and logprobs to the host
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kv.kv_cache import KVCache
from engine.models.ernie45 import Ernie45ForCausalLM
from engine.runner.input_batch import InputBatch
from engine.runner.prompt_logprobs import ScoredChunk, score_prompts
from engine.sampling.sampler import Sampled, Sampler
from engine.scheduler.batch import IntArray, ScheduledBatch, StepResult


@dataclass(frozen=True, kw_only=True)
class LaunchedStep:
    """A step on its way: `sampled` and `logits` belong to the rows at `sample_rows` of the batch."""

    step: int
    num_rows: int
    sample_rows: IntArray
    sampled: Sampled | None
    logits: Tensor | None
    done: torch.cuda.Event | None
    scored: tuple[ScoredChunk, ...] = ()

    def wait(self) -> StepResult:
        """The result, after every kernel of the step has completed."""
        if self.done is not None:
            self.done.synchronize()
        token_ids = np.full(self.num_rows, -1, dtype=np.int32)
        logprobs = {}
        if self.sampled is not None:
            token_ids[self.sample_rows] = self.sampled.token_ids.cpu().numpy()
            rows = self.sample_rows.tolist()
            logprobs = {rows[index]: found for index, found in self.sampled.read_logprobs().items()}
        logits = self.logits.cpu().numpy() if self.logits is not None else None
        prompt_logprobs = {chunk.score.index: chunk.read() for chunk in self.scored}
        return StepResult(
            step=self.step, token_ids=token_ids, logprobs=logprobs, logits=logits, prompt_logprobs=prompt_logprobs
        )


class ModelRunner:
    """One rank's model, KV and rows. `capture_logits` puts the sampled rows' logits into each StepResult."""

    def __init__(
        self,
        model: Ernie45ForCausalLM,
        kv: KVCache,
        *,
        num_rows: int,
        max_model_len: int,
        capture_logits: bool = False,
    ) -> None:
        self.model = model
        self.kv = kv
        config, options = model.config, model.options
        self._device = options.device
        self._inputs = InputBatch(num_rows=num_rows, max_model_len=max_model_len, kv=kv, options=options)
        self._sampler = Sampler(num_rows, config.vocab_size, options.device, config.eos_token_ids)
        self._capture_logits = capture_logits

    @property
    def checksum_algorithm(self) -> str:
        """See KVCache."""
        return self.kv.checksum_algorithm

    def checksum_blocks(self, block_ids: IntArray) -> list[int]:
        """See KVCache."""
        return self.kv.checksum_blocks(block_ids)

    def checksum_partial(self, block_id: int, num_tokens: int) -> int:
        """See KVCache."""
        return self.kv.checksum_partial(block_id, num_tokens)

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start a step."""
        inputs = self._inputs.prepare(batch)
        for start in batch.starts:
            self._sampler.start_row(start)
        hidden_TD = self.model.hidden(inputs.forward, self.kv)
        scored = score_prompts(batch, hidden_TD, self._inputs.token_table, self.model) if batch.scores else ()
        sampled: Sampled | None = None
        logits_SV: Tensor | None = None
        num_sampled = len(inputs.sample_rows)
        if num_sampled:
            logits_SV = self.model.logits(hidden_TD.index_select(0, inputs.sample_index))[:num_sampled]
            sampled = self._sampler.sample(logits_SV, inputs.sample_rows, inputs.sample_positions)
            self._inputs.store_sampled(inputs, sampled.token_ids)
        done: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return LaunchedStep(
            step=batch.step,
            num_rows=len(batch.rows),
            sample_rows=np.flatnonzero(batch.samples).astype(np.int32),
            sampled=sampled,
            logits=logits_SV if self._capture_logits else None,
            done=done,
            scored=scored,
        )
