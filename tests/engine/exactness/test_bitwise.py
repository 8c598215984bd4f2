"""A request's logits are the same bits whatever runs beside it, however its prompt is cut, wherever its blocks lie.

With torch's kernels the padding does it, with our own the one order of summation, on two threads. The negative controls
take that away and show that these tests notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu.library import CpuKernels, PackedWeight
from engine.request import SamplingParams
from tests.engine.exactness import harness
from tests.engine.exactness.harness import GREEDY, Cores, Outcome

# Wide enough for the libraries to change kernels with the number of rows; lengths cross the key tiles of 512.
DENSE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 6, "head_dim": 64}
MOE: dict[str, Any] = {**DENSE, "model_type": "ernie4_5_moe", "moe_intermediate_size": 128, "moe_num_experts": 6}
CASES = {
    "dense-float32": ("float32", DENSE),
    "dense-bfloat16": ("bfloat16", DENSE),
    "moe-float32": ("float32", MOE),
    "moe-bfloat16": ("bfloat16", MOE),
}
TORCH_CASES = ("dense-float32", "moe-bfloat16")
LENGTHS = (1, 15, 40, 130, 300, 505, 530, 640)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=8, ignore_eos=True, repetition_penalty=1.1)
PROMPTS = harness.prompts(7, LENGTHS)


def params_of(index: int) -> SamplingParams:
    return SAMPLED if index % 2 else GREEDY


@pytest.fixture(
    scope="module",
    params=[*((case, True) for case in CASES), *((case, False) for case in TORCH_CASES)],
    ids=lambda param: f"{param[0]}-{'own' if param[1] else 'torch'}",
)
def cores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cores:
    case, own = request.param
    dtype, checkpoint = CASES[case]
    kernels = harness.own_kernels() if own else None
    path = tmp_path_factory.mktemp("checkpoint")
    return Cores(harness.build(path, dtype=dtype, checkpoint=checkpoint, kernels=kernels))


@pytest.fixture(scope="module")
def oracles(cores: Cores) -> list[Outcome]:
    return [cores.alone(prompt, params_of(i), seed=i) for i, prompt in enumerate(PROMPTS)]


def submissions(indices: Iterator[int] | range) -> Iterator[Any]:
    return (harness.add(str(i), PROMPTS[i], params_of(i), seed=i) for i in indices)


def differing(outcomes: dict[str, Outcome], oracles: list[Outcome]) -> list[int]:
    return [i for i, oracle in enumerate(oracles) if str(i) in outcomes and not harness.same(outcomes[str(i)], oracle)]


@pytest.mark.parametrize("max_batched_tokens", [48, 2048])
def test_batch_and_chunking_change_no_bit(cores: Cores, oracles: list[Outcome], max_batched_tokens: int) -> None:
    core = cores.core(max_batched_tokens=max_batched_tokens, enable_prefix_caching=False)
    outcomes = harness.serve(core, submissions(range(len(PROMPTS))))
    assert len(outcomes) == len(PROMPTS)
    assert not differing(outcomes, oracles)


def test_a_step_in_flight_changes_no_bit(cores: Cores, oracles: list[Outcome]) -> None:
    core = cores.core(max_batched_tokens=200, steps_in_flight=1)
    assert not differing(harness.serve(core, submissions(range(len(PROMPTS)))), oracles)


def test_prefix_hits_in_other_blocks_change_no_bit(cores: Cores, oracles: list[Outcome]) -> None:
    core = cores.core()
    harness.serve(core, submissions(range(len(PROMPTS) - 1, -1, -1)))
    again = harness.serve(core, submissions(range(len(PROMPTS))))
    assert core.load().prefix_cache_hits > 0
    assert not differing(again, oracles)


def test_preemption_changes_no_bit(cores: Cores) -> None:
    # 8 blocks: the first three prompts take 5, with their outputs they would take 12.
    indices = range(3)
    core = cores.core(num_blocks=9, enable_prefix_caching=False)
    long = harness.with_params(GREEDY, max_tokens=40)
    outcomes = harness.serve(core, (harness.add(str(i), PROMPTS[i], long) for i in indices))
    assert core.load().num_preemptions > 0
    assert not differing(outcomes, [cores.alone(PROMPTS[i], long) for i in indices])


def test_aborted_neighbours_change_no_bit(cores: Cores, oracles: list[Outcome]) -> None:
    core = cores.core(max_batched_tokens=100)
    for request in submissions(range(len(PROMPTS))):
        core.submit(request)
    outcomes: dict[str, Outcome] = {}
    for aborted in ("1", "7", "4"):
        for _ in range(3):
            harness.take(core, outcomes)
        core.submit(harness.abort(aborted))
    harness.drain(core, outcomes)
    left = {request_id: outcome for request_id, outcome in outcomes.items() if outcome.finished}
    assert set(left) >= {"0", "2", "3", "5", "6"}
    assert not differing(left, oracles)


# -- negative controls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "row_multiple", "key_multiple"),
    [("dense-float32", 1, 512), ("dense-float32", 16, 1), ("dense-bfloat16", 16, 1)],
    ids=["linear padding off, float32", "key padding off, float32", "key padding off, bfloat16"],
)
def test_without_padding_bits_differ(
    case: str, row_multiple: int, key_multiple: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dtype, checkpoint = CASES[case]
    built = harness.build(
        tmp_path_factory.mktemp("checkpoint"),
        dtype=dtype,
        checkpoint=checkpoint,
        row_multiple=row_multiple,
        key_multiple=key_multiple,
    )
    assert bits_differ(Cores(built))


class OrderByRows(CpuKernels):
    """Kernels that add in another order when there are more rows: halves of the features apart, then their sum."""

    def linear(
        self, x_TI: Tensor, weight: PackedWeight, *, add: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        if len(x_TI) <= 4 or weight.gated:
            return super().linear(x_TI, weight, add=add, out_dtype=out_dtype)
        rows = self.unpack_rows(weight, torch.arange(weight.out_features))
        parts = [
            F.linear(x.float(), w.float()) for x, w in zip(x_TI.chunk(2, dim=1), rows.chunk(2, dim=1), strict=True)
        ]
        total = parts[0] + parts[1]
        return (total if add is None else add + total).to(out_dtype or x_TI.dtype)


def test_with_an_order_of_summation_that_depends_on_the_rows_bits_differ(tmp_path: Path) -> None:
    kernels = OrderByRows.load(Path.home() / ".cache" / "neap", 2)
    assert bits_differ(Cores(harness.build(tmp_path, checkpoint=DENSE, kernels=kernels)))


def test_own_kernels_give_the_same_bits_on_one_thread_and_on_three(tmp_path_factory: pytest.TempPathFactory) -> None:
    outcomes = [
        Cores(
            harness.build(
                tmp_path_factory.mktemp("checkpoint"),
                dtype="bfloat16",
                checkpoint=MOE,
                kernels=harness.own_kernels(threads),
            )
        ).alone(PROMPTS[5])
        for threads in (1, 3)
    ]
    assert harness.same(*outcomes)


def bits_differ(cores: Cores) -> bool:
    alone = [cores.alone(prompt, params_of(i), seed=i) for i, prompt in enumerate(PROMPTS)]
    core = cores.core(max_batched_tokens=100, enable_prefix_caching=False)
    return bool(differing(harness.serve(core, submissions(range(len(PROMPTS)))), alone))
