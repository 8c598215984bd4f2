"""The training model computes what transformers and our engine compute from its checkpoint."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from engine.llm import LLM
from engine.request import SamplingParams
from engine.tiny.skills import CHAT_TEMPLATE
from engine.tiny.training.batches import Tokens, micro_batches
from engine.tiny.training.export import read_checkpoint, write_checkpoint
from engine.tiny.training.model import TinyErnie
from tests.engine.tiny.training.conftest import SMALL

LENGTH = 40


@pytest.fixture(scope="module")
def checkpoint(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {**SMALL, "vocab_size": -(-small_tokenizer.get_vocab_size() // 16) * 16}
    torch.manual_seed(0)
    model = TinyErnie(config)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.1)
        elif "norm" in name:
            tensor.normal_(mean=1.0, std=0.2)
    write_checkpoint(folder, model, config, small_tokenizer, CHAT_TEMPLATE)
    return folder


def drawn(count: int) -> list[Tokens]:
    """Sequences of several lengths, every token trained."""
    rng = random.Random(0)
    lengths = [LENGTH - 3 * index for index in range(count)]
    return [
        Tokens(skill="x", ids=tuple(rng.randrange(20, 800) for _ in range(length)), trained=(True,) * length)
        for length in lengths
    ]


@torch.no_grad()
def log_probabilities(model: TinyErnie, sequences: list[Tokens]) -> dict[int, torch.Tensor]:
    """Of each sequence's tokens from the second on."""
    (batch,) = micro_batches(sequences, 10**6)
    chosen = model(batch.packed, batch.rows).next.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return {number: chosen[batch.owners == number] for number in range(len(sequences))}


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    sequences = drawn(3)
    ours = log_probabilities(read_checkpoint(checkpoint), sequences)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for number, sequence in enumerate(sequences):
        ids = torch.tensor(sequence.ids)
        with torch.no_grad():
            expected = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert torch.allclose(ours[number], expected, atol=1e-4)
        assert expected.std() > 0.3, "degenerate logits would prove nothing"


def test_logits_are_those_of_the_engine(checkpoint: Path) -> None:
    sequences = drawn(2)
    ours = log_probabilities(read_checkpoint(checkpoint), sequences)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with LLM(checkpoint, max_model_len=128, max_num_seqs=2, kv_cache_bytes=8 << 20, dtype="float32") as llm:
        outputs = llm.generate([list(sequence.ids) for sequence in sequences], params)
    for number, output in enumerate(outputs):
        assert output.prompt_logprobs is not None
        theirs = [entry.logprob for entry in output.prompt_logprobs[1:] if entry is not None]
        assert len(theirs) == len(ours[number])
        assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(ours[number].tolist(), theirs, strict=True))


def test_a_sequence_does_not_see_its_neighbours(checkpoint: Path) -> None:
    model, sequences = read_checkpoint(checkpoint), drawn(4)
    together = log_probabilities(model, sequences)
    for number, sequence in enumerate(sequences):
        alone = log_probabilities(model, [sequence])[0]
        assert torch.allclose(alone, together[number], atol=1e-5)


@torch.no_grad()
def test_the_second_next_token_depends_on_the_next_but_on_none_after(checkpoint: Path) -> None:
    model = read_checkpoint(checkpoint)
    (sequence,) = drawn(1)
    (batch,) = micro_batches([sequence], 10**6)
    before = model(batch.packed, batch.rows).second
    batch.packed.tokens[10] += 1  # seen from position 9 on
    after = model(batch.packed, batch.rows).second
    assert torch.allclose(before[:9], after[:9], atol=1e-6)
    assert not torch.allclose(before[9], after[9], atol=1e-3)
