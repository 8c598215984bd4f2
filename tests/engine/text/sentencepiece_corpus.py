"""Trains small SentencePiece models with byte fallback, such as ERNIE's checkpoints carry."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

SYMBOLS = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>", "<think>", "</think>")
_SENTENCES = (
    "the quick brown fox jumps over the lazy dog and then the other thing happens there",
    "prefill and decode run on separate workers; the router chooses them by predicted time",
    "def main(arguments: list[str]) -> int:  return 0",
    "你好、世界。今天的天气很好、我们去公园散步吧。你好吗。",
    "机器学习模型在服务器上运行、服务器把请求分给不同的机器。",
    "The capital of France is Paris. 1234567890 times 9876 is a number.",
)
_TEMPLATE = "{{ cls_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ sep_token }}{% endfor %}"


def train(**options: Any) -> bytes:
    """A BPE model of 400 pieces or so. The defaults are ERNIE's way: text as it is, no space put before it."""
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 450,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": list(SYMBOLS),
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
        **options,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(_SENTENCES * 3), model_writer=model, **settings)
    return model.getvalue()


def write_tokenizer(folder: Path, model: bytes, **config: Any) -> None:
    """tokenizer.model and tokenizer_config.json, with a chat template."""
    (folder / "tokenizer.model").write_bytes(model)
    names = {"cls_token": SYMBOLS[0], "sep_token": SYMBOLS[1], "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": _TEMPLATE, **config}))
