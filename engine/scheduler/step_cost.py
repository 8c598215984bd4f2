"""How long a step is predicted to take, and how much prefill fits into what is left of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.scheduler.batch import ScheduledBatch


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """A linear model of a step: a fixed part, a part per query token, a part per query token and 1000 keys it sees.

    All three are milliseconds, at least 0. Workers fit it to what they measure at start.
    """

    fixed_ms: float = 1.0
    ms_per_token: float = 0.1
    ms_per_token_kilocontext: float = 0.0

    def row_ms(self, query_len: int, num_computed: int) -> float:
        """What a row adds: query token i (from 0) sees num_computed + i + 1 keys."""
        keys = query_len * (num_computed + (query_len + 1) / 2)
        return self.ms_per_token * query_len + self.ms_per_token_kilocontext * keys / 1000

    def predict(self, rows: list[tuple[int, int]]) -> float:
        """Milliseconds of a step over rows of (query_len, num_computed)."""
        row_ms = self.row_ms
        return self.fixed_ms + sum([row_ms(query_len, num_computed) for query_len, num_computed in rows])

    def predict_batch(self, batch: ScheduledBatch) -> float:
        """Milliseconds of one batch."""
        return self.predict(list(zip(batch.query_lens.tolist(), batch.num_computed.tolist(), strict=True)))

    def longest_chunk(self, budget_ms: float, num_computed: int, at_most: int) -> int:
        """The most query tokens, up to `at_most`, whose row_ms stays within `budget_ms`; 0 if none does."""
        if self.row_ms(at_most, num_computed) <= budget_ms:
            return at_most
        # a q^2 + b q = budget, with a = k/2 and b = m + k (num_computed + 1/2); solved in the form that suits a = 0
        a = self.ms_per_token_kilocontext / 2000
        b = self.ms_per_token + self.ms_per_token_kilocontext * (num_computed + 0.5) / 1000
        if budget_ms <= 0:
            return 0
        return min(at_most, math.floor(2 * budget_ms / (b + math.sqrt(b * b + 4 * a * budget_ms))))
