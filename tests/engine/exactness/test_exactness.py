"""Against transformers: the same checkpoint folder, float32, logits within 1e-4 and the same greedy continuations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from engine.scheduler.batch import IntArray
from tests.engine.exactness import harness
from tests.engine.exactness.harness import GREEDY, Cores, Outcome

pytestmark = pytest.mark.timeout(600)

NUM_OUTPUTS = 64
TOLERANCE = 1e-4

# Six shapes that take every branch of the model files; 6 prompts each, so 36 continuations.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "dense, q wider than hidden": {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "dense, untied, three queries per key": {
        "tie_word_embeddings": False,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "head_dim": 16,
        "rope_theta": 10000.0,
    },
    "moe like 21B: 2 shared, tied, from layer 1": {"model_type": "ernie4_5_moe", "num_nextn_predict_layers": 1},
    "moe like 300B: no shared, untied, from layer 3": {
        "model_type": "ernie4_5_moe",
        "moe_num_shared_experts": 0,
        "tie_word_embeddings": False,
        "moe_layer_start_index": 3,
        "num_hidden_layers": 5,
        "moe_k": 3,
    },
    "moe every other layer up to 4, in shards": {
        "model_type": "ernie4_5_moe",
        "moe_layer_interval": 2,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 4,
        "num_hidden_layers": 6,
        "num_shards": 3,
    },
    "moe with all experts and 1 shared, bfloat16 weights": {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": 4,
        "moe_k": 4,
        "moe_num_shared_experts": 1,
        "num_key_value_heads": 4,
        "dtype": "bfloat16",
    },
}


@dataclass(frozen=True)
class Case:
    prompts: list[IntArray]
    ours: dict[str, Outcome]
    theirs: torch.nn.Module


# Our own kernels on every shape; torch's on one of each model type.
CASES = [
    *((name, True) for name in CHECKPOINTS),
    ("dense, untied, three queries per key", False),
    ("moe like 21B: 2 shared, tied, from layer 1", False),
]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{'own' if case[1] else 'torch'}: {case[0]}".replace(" ", "-")
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.set_num_threads(1)
    name, own = request.param
    index = list(CHECKPOINTS).index(name)
    path = tmp_path_factory.mktemp("checkpoint")
    kernels = harness.own_kernels() if own else None
    built = harness.build(path, seed=index, checkpoint=CHECKPOINTS[name], kernels=kernels)
    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = harness.prompts(index, (1, 2, 17, 33, 64, 90))
    params = harness.with_params(GREEDY, max_tokens=NUM_OUTPUTS)
    core = Cores(built).core(max_batched_tokens=96)
    ours = harness.serve(core, (harness.add(str(i), prompt, params) for i, prompt in enumerate(prompts)))
    return Case(prompts, ours, theirs.eval())


def logits_of_transformers(case: Case, index: int) -> np.ndarray:
    """What the reference says at each position of our own output, in one pass."""
    prompt, outcome = case.prompts[index], case.ours[str(index)]
    tokens = torch.tensor([*prompt.tolist(), *outcome.tokens[:-1]])[None]
    with torch.inference_mode():
        logits: np.ndarray = case.theirs(tokens).logits[0, len(prompt) - 1 :].numpy()
    return logits


def test_logits_and_continuations_are_those_of_transformers(case: Case) -> None:
    for index in range(len(case.prompts)):
        outcome = case.ours[str(index)]
        theirs = logits_of_transformers(case, index)
        ours = np.stack([outcome.logits[position] for position in range(NUM_OUTPUTS)])
        assert ours.std() > 1.0, "degenerate logits would prove nothing"
        assert np.abs(ours - theirs).max() < TOLERANCE
        # By induction this is their greedy continuation: each token is their choice after the same tokens.
        assert outcome.tokens == theirs.argmax(-1).tolist()


def test_their_own_generate_agrees(case: Case) -> None:
    prompt = case.prompts[2]
    with torch.inference_mode():
        theirs = case.theirs.generate(  # type: ignore[operator]
            torch.tensor(prompt.tolist())[None],
            max_new_tokens=NUM_OUTPUTS,
            min_new_tokens=NUM_OUTPUTS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert case.ours["2"].tokens == theirs[0, len(prompt) :].tolist()
