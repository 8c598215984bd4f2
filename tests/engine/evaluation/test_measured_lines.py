"""Experts' load and MTP's agreement as lines for people, from a checkpoint of the training code."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from engine.evaluation.offline import measured_lines
from engine.tiny.byte_tokenizer import write_byte_tokenizer
from engine.tiny.random_checkpoint import make_random_checkpoint
from engine.tiny.skills import CHAT_TEMPLATE, held_out, segments, training_examples
from engine.tiny.training.export import write_checkpoint
from engine.tiny.training.model import TinyErnie
from engine.tiny.training.settings import EMBEDDED_SHAPE
from engine.tiny.training.tokenizer import train_tokenizer

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "moe_num_experts": 4,
    "moe_intermediate_size": 24,
    "moe_layer_end_index": 1,
}


def test_load_and_agreement_are_told(tmp_path: Path) -> None:
    texts = (text for example in itertools.islice(training_examples(3), 200) for text, _ in segments(example))
    tokenizer = train_tokenizer(texts, 800)
    config = {**EMBEDDED_SHAPE, **SMALL, "vocab_size": 896}
    torch.manual_seed(0)
    write_checkpoint(tmp_path, TinyErnie(config), config, tokenizer, CHAT_TEMPLATE)
    heading, layer, extremes, agreement = measured_lines(tmp_path, held_out("addition", 8))
    assert "by MoE layer" in heading
    loads = [float(load) for load in layer.partition(":")[2].split()]
    assert len(loads) == 4 and sum(loads) == pytest.approx(4, abs=0.03)
    assert extremes == f"  least {min(loads):.2f}, most {max(loads):.2f}"
    assert re.fullmatch(r"MTP: second next token agrees in [0-9.]+% of the places", agreement)


def test_a_checkpoint_without_an_mtp_block_cannot_be_measured(tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path, model_type="ernie4_5_moe", vocab_size=write_byte_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="can't be measured"):
        list(measured_lines(tmp_path, held_out("addition", 1)))
