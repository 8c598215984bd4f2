"""One thread per test, as the rules ask; and a short way to fill rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.request import SamplingParams
from engine.sampling.sampler import Sampler
from engine.scheduler.batch import RowStart

StartRow = Callable[..., None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start_row() -> StartRow:
    def start(
        sampler: Sampler,
        row: int,
        *,
        prompt: tuple[int, ...] = (1, 2, 3),
        outputs: tuple[int, ...] = (),
        seed: int = 0,
        choice: int = 0,
        **params: Any,
    ) -> None:
        sampler.start_row(
            RowStart(
                row=row,
                request_id=f"r{row}",
                token_ids=np.array([*prompt, *outputs], dtype=np.int32),
                num_prompt_tokens=len(prompt),
                params=SamplingParams(**{"max_tokens": None, **params}),
                seed=seed,
                choice=choice,
            )
        )

    return start
