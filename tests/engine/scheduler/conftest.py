"""A runner that checks every batch against the step contract before it runs it."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake_engine import FakeRunner, FakeStep
from engine.kv.block_manager import BlockState
from engine.scheduler.batch import RowStart, ScheduledBatch


class WatchedRunner(FakeRunner):
    """The fake, which first checks that a batch keeps the scheduler's promises."""

    def watch(self, core: EngineCore, config: EngineConfig) -> None:
        self.core, self.config = core, config
        self.tables: dict[int, dict[int, int]] = {}
        self.starts: dict[int, RowStart] = {}

    def launch(self, batch: ScheduledBatch) -> FakeStep:
        blocks = self.core.scheduler.blocks
        block_size = blocks.block_size
        for start in batch.starts:
            self.tables[start.row], self.starts[start.row] = {}, start
        for news in batch.new_blocks:
            self.tables[news.row].update(enumerate(news.block_ids.tolist(), start=news.first))
        rows = list(zip(batch.rows.tolist(), batch.num_computed.tolist(), batch.query_lens.tolist(), strict=True))
        assert len(set(batch.rows.tolist())) == len(rows), "a row is scheduled twice"
        assert 0 < batch.num_tokens <= self.config.max_batched_tokens and (batch.query_lens > 0).all()
        assert (batch.query_lens[: batch.num_decode_rows] == 1).all()
        for row, first, query_len in rows:
            for i in range(first // block_size, (first + query_len - 1) // block_size + 1):
                state = blocks.state(self.tables[row][i])
                assert state is BlockState.LOADING, f"a step writes into a {state.value} block"
        for i, (row, first, query_len) in enumerate(rows):
            start = self.starts[row]
            limit = start.num_prompt_tokens + (start.params.max_tokens or 0)
            assert not batch.samples[i] or first + query_len < limit, "a row is scheduled beyond its length"
        prefills = rows[batch.num_decode_rows :]
        is_forced = len(prefills) == 1 and prefills[0][2] <= block_size
        in_time = self.core.step_cost.predict_batch(batch) <= self.config.max_step_ms + 1e-6
        assert in_time or is_forced or not prefills, "prefill makes the step too long"
        return super().launch(batch)


@pytest.fixture
def watched_runner() -> type[FakeRunner]:
    """The class WatchedRunner; call `watch(core, config)` on its instance."""
    return WatchedRunner
