"""A shape and a tokenizer that train in seconds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from tokenizers import Tokenizer

from engine.tiny.skills import segments, training_examples
from engine.tiny.training.settings import EMBEDDED_SHAPE, Settings
from engine.tiny.training.tokenizer import train_tokenizer

SMALL: dict[str, Any] = {
    **EMBEDDED_SHAPE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "moe_num_experts": 4,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 2,
    "moe_layer_end_index": 1,
}


@pytest.fixture(scope="session")
def small_settings() -> Settings:
    return Settings(
        shape=SMALL,
        vocab_size=600,
        tokenizer_examples=300,
        step_tokens=600,
        micro_tokens=256,
        max_length=200,
        warmup_steps=2,
        eval_questions=1,
        eval_length=120,
        eval_steps=4,
        save_steps=1000,
        tokens=3600,
    )


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    examples = itertools.islice(training_examples(3), 400)
    return train_tokenizer((text for example in examples for text, _ in segments(example)), 900)
