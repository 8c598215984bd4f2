"""What is trained on is what serving sees: the same ids, each answer token predicted from those before it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer

from engine.text.tokenizer import Tokenizer
from engine.tiny.skills import CHAT_TEMPLATE, SKILLS, held_out, training_examples
from engine.tiny.training.batches import IGNORED, Tokens, encode, micro_batches, take
from engine.tiny.training.tokenizer import write_tokenizer


def test_training_ids_are_the_ids_of_serving(small_tokenizer: RawTokenizer, tmp_path: Path) -> None:
    write_tokenizer(small_tokenizer, tmp_path, CHAT_TEMPLATE)
    serving = Tokenizer.load(tmp_path)
    for example in (example for skill in SKILLS for example in held_out(skill, 3)):
        extra: dict[str, Any] = {"tools": list(example.tools)} if example.tools else {}
        if example.enable_thinking is not None:
            extra["enable_thinking"] = example.enable_thinking
        tokens = encode(example, small_tokenizer)
        prompt_text = serving.template.render(example.messages[:-1], extra=extra)
        prompt = serving.encode(prompt_text, add_special_tokens=False)
        assert list(tokens.ids[: len(prompt)]) == prompt
        assert all(tokens.trained[len(prompt) :]) and not tokens.trained[len(prompt) - 1]
        if not any("tool_calls" in message for message in example.messages):
            plain = list(example.messages[:-1])
            assert serving.encode_chat(plain, extra=extra) == prompt
        assert tokens.ids[-1] in serving.eos_token_ids


def test_micro_batches_hold_every_answer_once(small_tokenizer: RawTokenizer) -> None:
    sequences = take(training_examples(5), small_tokenizer, num_tokens=4000, max_length=300)
    assert sum(len(sequence.ids) for sequence in sequences) >= 4000
    found: dict[int, list[int]] = {}
    for batch in micro_batches(sequences, 512):
        packed = batch.packed
        assert packed.fill.numel() <= 512 or len(packed.fill) == 1
        assert torch.equal(packed.fill.flatten()[packed.place], torch.arange(len(packed.tokens)))
        assert torch.equal(batch.targets, packed.tokens[batch.rows + 1])
        known = batch.second_targets != IGNORED
        assert torch.equal(batch.second_targets[known], packed.tokens[batch.rows[known] + 2])
        for owner, target in zip(batch.owners.tolist(), batch.targets.tolist(), strict=True):
            found.setdefault(owner, []).append(target)
    for number, sequence in enumerate(sequences):
        answer = [token for token, trained in zip(sequence.ids, sequence.trained, strict=True) if trained]
        assert found[number] == answer


def test_the_end_of_an_answer_has_no_second_next_token() -> None:
    trained = (False, True, True, False, True)
    (batch,) = micro_batches([Tokens(skill="x", ids=(5, 6, 7, 8, 9), trained=trained)], 64)
    assert batch.rows.tolist() == [0, 1, 3]
    assert batch.second_targets.tolist() == [7, IGNORED, IGNORED]


def test_long_examples_are_left_out(small_tokenizer: RawTokenizer) -> None:
    limited = itertools.islice(training_examples(5), 500)
    assert all(len(sequence.ids) <= 30 for sequence in take(limited, small_tokenizer, num_tokens=10**9, max_length=30))
