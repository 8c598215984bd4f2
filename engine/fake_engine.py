"""The exact fake model: real scheduler and block manager over a runner whose text proves the KV.

    KV of position p:  c_p = H(c_(p-1) as READ from the pool, token, p), spread over all bytes of the position
    next token:        H(all KV bytes of positions [0, n) as READ from the pool; seed, choice and n if it samples)

Any KV that is lost, stale, swapped or corrupted changes the text, and `FakeModel.oracle` says what the text must be.
It makes no difference how the prompt was chunked, batched, cached or pulled, nor what layout the pool has.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.kv.block_manager import BlockManager
from engine.kv.layout import KVLayout
from engine.kv.memory import ByteArray, KVMemory
from engine.request import SamplingParams
from engine.scheduler.batch import IntArray, PromptScore, RowStart, ScheduledBatch, StepResult, TokenLogprobs
from engine.scheduler.profile import Profile, profile_of
from engine.scheduler.request_state import ModelLimits
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_cost import StepCost

WordArray = npt.NDArray[np.uint64]
_LINK = struct.Struct("<Qii")
_NOISE = struct.Struct("<QQII")
_WORD_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """What the fake generates. Tokens are drawn from `vocabulary`; eos only with `stop_probability` per token.

    Raises ValueError when the vocabulary holds eos or an id outside [0, vocab_size).
    """

    identity: str = "fake"
    vocab_size: int = 256
    vocabulary: Sequence[int] = range(3, 256)
    eos_token_id: int = 2
    stop_probability: float = 0.0

    def __post_init__(self) -> None:
        if self.eos_token_id in self.vocabulary:
            raise ValueError("vocabulary must not hold eos_token_id: stop_probability decides when it comes")
        if not self.vocabulary or not 0 <= min(self.vocabulary) <= max(self.vocabulary) < self.vocab_size:
            raise ValueError(f"vocabulary must be ids in [0, {self.vocab_size})")

    @cached_property
    def root(self) -> int:
        """The chain value before position 0."""
        return xxhash.xxh3_64_intdigest(self.identity.encode())

    def chain(self, previous: int, tokens: Sequence[int], first_position: int) -> list[int]:
        """Chain values of `tokens` from `first_position` on, after the value `previous`."""
        digest, pack = xxhash.xxh3_64_intdigest, _LINK.pack
        links = enumerate(tokens, start=first_position)
        return [previous := digest(pack(previous, token, position)) for position, token in links]

    def choose(self, kv_digest: int, params: SamplingParams, seed: int, choice: int, n: int, num_outputs: int) -> int:
        """The token at position n. Only temperature, min_tokens and the stop ids of `params` matter."""
        if params.temperature == 0.0:
            seed = choice = 0
        value = xxhash.xxh3_64_intdigest(_NOISE.pack(kv_digest, seed, choice, n))
        vocabulary = self.vocabulary
        index = (value >> 20) % len(vocabulary)
        if num_outputs >= params.min_tokens:
            stops = value % 1_000_003 < self.stop_probability * 1_000_003
            return self.eos_token_id if stops else vocabulary[index]
        for _ in range(len(vocabulary)):
            token = vocabulary[index]
            if token not in params.stop_token_ids:
                return token
            index = (index + 1) % len(vocabulary)
        return token

    def prompt_logprob(self, chain_value: int, token: int) -> float:
        """The logprob of a prompt token after the position whose chain value this is: a whole number of 1/64."""
        return -(xxhash.xxh3_64_intdigest(_LINK.pack(chain_value, token, -1)) % 1024) / 64

    def prompt_oracle(self, prompt: Sequence[int]) -> list[float]:
        """Logprobs of the prompt's tokens from the second on."""
        chain = self.chain(self.root, prompt, 0)
        return [self.prompt_logprob(value, token) for value, token in zip(chain, prompt[1:], strict=False)]

    def oracle(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        choice: int = 0,
        num_tokens: int | None = None,
        token_words: int = 2,
    ) -> list[int]:
        """What a request must produce, from its tokens alone: up to num_tokens (default max_tokens), stop included.

        `token_words` is KVLayout.token_bytes / 8 of the pool.
        """
        limit = num_tokens if num_tokens is not None else params.max_tokens
        if limit is None:
            raise ValueError("give num_tokens for a request without max_tokens")
        if not limit:
            return []
        stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else {self.eos_token_id})
        chain = self.chain(self.root, prompt, 0)
        digest = xxhash.xxh3_64(spread(chain, token_words).tobytes())
        last, pack, odd = chain[-1], struct.Struct(f"<{token_words}Q").pack, odd_multipliers(token_words).tolist()
        outputs: list[int] = []
        while len(outputs) < limit:
            n = len(prompt) + len(outputs)
            token = self.choose(digest.intdigest(), params, seed, choice, n, len(outputs))
            outputs.append(token)
            if token in stop_ids and len(outputs) > params.min_tokens:
                break
            last = xxhash.xxh3_64_intdigest(_LINK.pack(last, token, n))
            digest.update(pack(*[last * factor & _WORD_MASK for factor in odd]))  # as `spread`, without its arrays
        return outputs


def spread(chain: Sequence[int], num_words: int) -> WordArray:
    """uint64 [n, num_words]: each position's chain value, once as it is and then by odd multiples (all invertible)."""
    return np.array(chain, dtype=np.uint64)[:, None] * odd_multipliers(num_words)


@cache
def odd_multipliers(num_words: int) -> WordArray:
    """uint64 [num_words]: 1, then odd numbers."""
    odd = np.arange(num_words, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C16) + np.uint64(1)
    odd.flags.writeable = False
    return odd


class ArrayMemory:
    """KVMemory's views over a plain array, for engines that share with nobody (thousands of them in one test)."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.bytes6: ByteArray = np.zeros(layout.byte_shape, dtype=np.uint8)

    def block(self, block_id: int) -> ByteArray:
        """uint8 [block_bytes], a view of one whole block."""
        view: ByteArray = self.bytes6[block_id].reshape(-1)
        return view

    def partial(self, block_id: int, num_tokens: int) -> ByteArray:
        """uint8 [L, 2, H, num_tokens, D], a strided view of a block's first tokens."""
        return self.bytes6[block_id, :, :, :, :num_tokens, :]


class _Row(msgspec.Struct, kw_only=True):
    start: RowStart
    tokens: list[int]
    table: list[int]


class FakeStep(msgspec.Struct, kw_only=True, eq=False):
    """A launched step of the fake; its KV is written when it is waited for (or at launch, see FakeRunner)."""

    runner: FakeRunner
    batch: ScheduledBatch
    result: StepResult | None = None

    def wait(self) -> StepResult:
        """Take the step's time, then its result. Steps are waited for in the order of their launch."""
        return self.runner.finish(self)


class FakeRunner:
    """Runner over uint8 KV memory whose head_dim is a multiple of 8.

    `execute_at` "wait" writes KV as late as a device could, "launch" as early: tests use both. `sleep` (seconds) makes
    a step take `speed`'s time in a real process; None in tests and under a virtual clock.
    """

    def __init__(
        self,
        model: FakeModel,
        memory: KVMemory | ArrayMemory,
        *,
        max_model_len: int,
        speed: StepCost,
        sleep: Callable[[float], None] | None = None,
        execute_at: Literal["wait", "launch"] = "wait",
    ) -> None:
        layout = memory.layout
        if layout.dtype != "uint8" or layout.head_dim % 8:
            raise ValueError(f"the fake needs uint8 KV with head_dim a multiple of 8, got {layout}")
        self.model = model
        self.memory = memory
        self._block_size = layout.block_size
        self._token_words = layout.token_bytes // 8
        self._head_words = layout.head_dim // 8
        # uint64 [num_blocks, L * 2 * H, block_size, D / 8], a view
        self._pool = memory.bytes6.view(np.uint64).reshape(layout.num_blocks, -1, layout.block_size, self._head_words)
        self._odd2 = odd_multipliers(self._token_words).reshape(-1, self._head_words)  # [L * 2 * H, D / 8]
        self._max_blocks = layout.blocks_for(max_model_len)
        self._speed = speed
        self._sleep = sleep
        self._execute_at_launch = execute_at == "launch"
        self._rows: dict[int, _Row] = {}
        self._launched: deque[FakeStep] = deque()

    @property
    def checksum_algorithm(self) -> str:
        """xxh3, 64 bits, on the host."""
        return "xxh3_64"

    def launch(self, batch: ScheduledBatch) -> FakeStep:
        """See Runner."""
        step = FakeStep(runner=self, batch=batch)
        if self._execute_at_launch:
            step.result = self._execute(batch)
        self._launched.append(step)
        return step

    def finish(self, step: FakeStep) -> StepResult:
        """Complete the oldest launched step."""
        assert self._launched.popleft() is step, "steps are waited for in the order of their launch"
        if self._sleep is not None:
            self._sleep(self._speed.predict_batch(step.batch) / 1000)
        return step.result if step.result is not None else self._execute(step.batch)

    def checksum_blocks(self, block_ids: IntArray) -> list[int]:
        """See Runner."""
        return [xxhash.xxh3_64_intdigest(self.memory.block(block_id).data) for block_id in block_ids.tolist()]

    def checksum_partial(self, block_id: int, num_tokens: int) -> int:
        """See Runner."""
        return xxhash.xxh3_64_intdigest(self.memory.partial(block_id, num_tokens).tobytes())

    def _execute(self, batch: ScheduledBatch) -> StepResult:
        for start in batch.starts:
            self._rows[start.row] = _Row(start=start, tokens=start.token_ids.tolist(), table=[])
        for news in batch.new_blocks:
            table = self._rows[news.row].table
            assert news.first == len(table) < self._max_blocks, f"row {news.row}: a hole in its block table"
            table += news.block_ids.tolist()
        rows = [self._rows[row] for row in batch.rows.tolist()]
        shape = list(zip(rows, batch.num_computed.tolist(), batch.query_lens.tolist(), strict=True))
        for row, num_computed, query_len in shape:
            if query_len == 1:
                self._write_token(row, num_computed)
            else:
                self._write_kv(row, num_computed, query_len)
        token_ids = [-1] * len(shape)
        logprobs: dict[int, TokenLogprobs] = {}
        for i, samples in enumerate(batch.samples.tolist()):
            if samples:
                row, num_computed, query_len = shape[i]
                token_ids[i] = self._sample(row, num_computed + query_len)
                num_tops = row.start.params.logprobs
                if num_tops is not None:
                    logprobs[i] = self._logprobs(token_ids[i], num_tops)
        prompt_logprobs = {score.index: self._score(rows[score.index], score) for score in batch.scores}
        sampled = np.array(token_ids, dtype=np.int32)
        return StepResult(step=batch.step, token_ids=sampled, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _value_before(self, row: _Row, position: int) -> int:
        """The chain value of the position before this one, as it lies in the pool."""
        block, offset = divmod(position - 1, self._block_size)
        return self._pool.item(row.table[block], 0, offset, 0) if position else self.model.root

    def _write_token(self, row: _Row, position: int) -> None:
        """What _write_kv does, for one token: every decode row of every step comes here."""
        block_id = row.table[position // self._block_size]
        assert block_id, f"row {row.start.row} writes into the null block"
        value = self.model.chain(self._value_before(row, position), (row.tokens[position],), position)[0]
        self._pool[block_id, :, position % self._block_size] = self._odd2 * value

    def _write_kv(self, row: _Row, num_computed: int, query_len: int) -> None:
        """Block by block: plain slices take a fraction of what indexing by arrays of positions would."""
        size, end = self._block_size, num_computed + query_len
        tokens = row.tokens[num_computed:end]
        assert len(tokens) == query_len, f"row {row.start.row} computes tokens that it does not have"
        chain = self.model.chain(self._value_before(row, num_computed), tokens, num_computed)
        words3 = spread(chain, self._token_words).reshape(query_len, -1, self._head_words).swapaxes(0, 1)
        at = num_computed  # words3 is [L * 2 * H, n, D / 8], as the pool has it
        while at < end:
            block_id, first = row.table[at // size], at % size
            assert block_id, f"row {row.start.row} writes into the null block"
            num = min(size - first, end - at)
            self._pool[block_id, :, first : first + num] = words3[:, at - num_computed : at - num_computed + num]
            at += num

    def _sample(self, row: _Row, n: int) -> int:
        kv = self._pool.take(row.table[: -(-n // self._block_size)], 0).swapaxes(1, 2)  # a copy of what is there now
        kv_digest = xxhash.xxh3_64_intdigest(kv.reshape(-1, self._token_words)[:n].tobytes())
        start = row.start
        num_outputs = n - start.num_prompt_tokens
        token = self.model.choose(kv_digest, start.params, start.seed, start.choice, n, num_outputs)
        assert len(row.tokens) == n, f"row {start.row} samples position {n} but holds {len(row.tokens)} tokens"
        row.tokens.append(token)
        return token

    def _score(self, row: _Row, score: PromptScore) -> tuple[TokenLogprobs, ...]:
        """From the chain values as they are read from the pool."""
        scored = []
        for position in range(score.first_position, score.first_position + score.count):
            token = row.tokens[position]
            logprob = self.model.prompt_logprob(self._value_before(row, position), token)
            entry = self._logprobs(token, score.num_top)
            scored.append(replace(entry, logprob=logprob))
        return tuple(scored)

    def _logprobs(self, token: int, num_tops: int) -> TokenLogprobs:
        others = [other for other in self.model.vocabulary[: num_tops + 1] if other != token]
        top_ids = tuple([token, *others][:num_tops])
        top_logprobs = tuple(-0.5 - rank for rank in range(len(top_ids)))
        return TokenLogprobs(logprob=-0.5, top_ids=top_ids, top_logprobs=top_logprobs)


@dataclass(frozen=True, kw_only=True)
class FakeConfig:
    """A fake engine: options, model, speed and pool. max_model_len 0 means 4096, block_size 0 means 16."""

    engine: EngineConfig = field(default_factory=lambda: EngineConfig(model="fake"))
    model: FakeModel = field(default_factory=FakeModel)
    speed: StepCost = field(default_factory=StepCost)
    num_blocks: int = 512
    num_layers: int = 1
    num_kv_heads: int = 1
    head_dim: int = 8

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and outputs."""
        return self.engine.max_model_len or 4096

    @cached_property
    def profile(self) -> Profile:
        """What it says of itself: exactly its speed."""
        return profile_of(
            self.speed,
            max_step_ms=self.engine.max_step_ms,
            max_step_tokens=self.engine.max_batched_tokens,
            max_num_seqs=self.engine.max_num_seqs,
            kv_token_bytes=self.layout.token_bytes,
        )

    @cached_property
    def layout(self) -> KVLayout:
        """The KV pool's layout."""
        return KVLayout(
            num_blocks=self.num_blocks,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            block_size=self.engine.block_size or 16,
            head_dim=self.head_dim,
            dtype="uint8",
        )


def build_fake_engine(
    config: FakeConfig,
    *,
    memory: KVMemory | ArrayMemory | None = None,
    sleep: Callable[[float], None] | None = None,
    execute_at: Literal["wait", "launch"] = "wait",
) -> EngineCore:
    """An EngineCore over the fake. `memory` must have config.layout; without it the pool is private to the engine."""
    memory = memory or ArrayMemory(config.layout)
    if memory.layout != config.layout:
        raise ValueError(f"memory has {memory.layout}, the config says {config.layout}")
    blocks = BlockManager(
        num_blocks=config.num_blocks,
        block_size=memory.layout.block_size,
        served_fraction=config.engine.served_block_fraction,
        enable_prefix_caching=config.engine.enable_prefix_caching,
    )
    limits = ModelLimits(
        identity=config.model.identity,
        max_model_len=config.max_model_len,
        vocab_size=config.model.vocab_size,
        eos_token_ids=(config.model.eos_token_id,),
    )
    runner = FakeRunner(
        config.model,
        memory,
        max_model_len=config.max_model_len,
        speed=config.speed,
        sleep=sleep,
        execute_at=execute_at,
    )
    scheduler = Scheduler(config.engine, limits=limits, blocks=blocks, step_cost=config.speed)
    return EngineCore(scheduler=scheduler, runner=runner, steps_in_flight=config.engine.steps_in_flight)
