"""The offline API on a tiny random model: prompt logprobs, restrictions, truncation, priorities, others' options."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.llm import LLM
from engine.request import SamplingParams
from engine.tiny.byte_tokenizer import write_byte_tokenizer
from engine.tiny.random_checkpoint import make_random_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
OPTIONS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_bytes": 8 << 20}
PROMPT = "the moon pulls the sea, and the sea follows late"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_random_checkpoint(folder, model_type="ernie4_5", vocab_size=write_byte_tokenizer(folder))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, **OPTIONS) as llm:
        yield llm


def test_prompt_logprobs_are_to_the_bit_what_sampling_that_token_there_would_say(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, replace(GREEDY, prompt_logprobs=3))
    scores, ids = output.prompt_logprobs, output.prompt_token_ids
    assert scores is not None and len(scores) == len(ids) and scores[0] is None
    prefixes = [list(ids[:position]) for position in range(1, len(ids))]
    forced = [
        replace(GREEDY, max_tokens=1, allowed_token_ids=(token,), logprobs=3) for token in ids[1:]
    ]  # one token that may come: its logprob is of the raw logits all the same
    for said, there in zip(scores[1:], llm.generate(prefixes, forced), strict=True):
        assert there.outputs.logprobs is not None and said == there.outputs.logprobs[0]


def test_prompt_logprobs_are_the_same_in_chunks_with_choices_and_beside_others(llm: LLM, checkpoint: Path) -> None:
    params = replace(GREEDY, prompt_logprobs=2, temperature=0.8, seed=5)
    (alone,) = llm.generate(PROMPT, params)
    (again,) = llm.generate(PROMPT, params)
    assert again.prompt_logprobs == alone.prompt_logprobs, "the cache is not read"
    mixed = llm.generate(
        ["x", PROMPT, PROMPT + "!"], [GREEDY, replace(params, n=3), replace(params, prompt_logprobs=0)]
    )
    assert mixed[0].prompt_logprobs is None
    assert mixed[1].prompt_logprobs == alone.prompt_logprobs and len(mixed[1].choices) == 3
    assert mixed[1].choices[0].token_ids == alone.outputs.token_ids
    assert mixed[2].prompt_logprobs is not None and {
        len(one.top_ids) for one in mixed[2].prompt_logprobs[1:] if one
    } == {0}
    with LLM(checkpoint, **OPTIONS, max_batched_tokens=16, steps_in_flight=1) as chunked:
        (small,) = chunked.generate(PROMPT, params)
        assert small.prompt_logprobs == alone.prompt_logprobs and small.outputs == alone.outputs


def test_bad_words_and_allowed_tokens_hold_and_cost_others_nothing(llm: LLM) -> None:
    params = replace(GREEDY, max_tokens=24)
    (free,) = llm.generate(PROMPT, params)
    # what it says first, and a pair of tokens that it says later
    first, pair = free.outputs.token_ids[0], free.outputs.token_ids[5:7]
    without = replace(params, bad_token_sequences=((first,), pair))
    beside, restricted = llm.generate([PROMPT, PROMPT], [params, without])
    assert beside.outputs == free.outputs
    got = restricted.outputs.token_ids
    assert first not in got and pair not in list(itertools.pairwise(got))
    word = llm.tokenizer.decode([first])
    if word.strip().isascii() and word.strip():
        (spoken,) = llm.generate(PROMPT, replace(params, bad_words=(word,)))
        assert first not in spoken.outputs.token_ids
    allowed = tuple(llm.tokenizer.encode("abc"))
    (only,) = llm.generate(PROMPT, replace(params, allowed_token_ids=allowed, temperature=1.0))
    assert set(only.outputs.token_ids) <= set(allowed)
    with pytest.raises(ValueError, match="allowed_token_ids: token ids must be in"):
        llm.generate("x", replace(GREEDY, allowed_token_ids=(10**6,)))


def test_a_long_prompt_is_truncated_to_its_end(llm: LLM) -> None:
    ids = llm.tokenizer.encode("y" * 300 + "end")
    with pytest.raises(ValueError, match="prompts\\[0\\] has"):
        llm.generate([ids], GREEDY)
    (kept,) = llm.generate([ids], replace(GREEDY, truncate_prompt_tokens=10))
    assert list(kept.prompt_token_ids) == ids[-10:]
    (most,) = llm.generate([ids], replace(GREEDY, truncate_prompt_tokens=-1))
    assert len(most.prompt_token_ids) == 128 - 4


def test_priorities_and_salts_change_no_text(llm: LLM) -> None:
    prompts = [f"{PROMPT} {index}" for index in range(6)]
    plain = llm.generate(prompts, GREEDY)
    ordered = llm.generate(prompts, GREEDY, priority=[5, 4, 3, 2, 1, -7], cache_salt="mine")
    assert [one.outputs for one in ordered] == [one.outputs for one in plain]
    with pytest.raises(ValueError, match="6 prompts need 6 priorities, got 1"):
        llm.generate(prompts, GREEDY, priority=[1])


def test_options_of_other_engines_are_understood_told_or_refused(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others: dict[str, Any] = {
        "tensor_parallel_size": 1, "quantization": None, "gpu_memory_utilization": 0.9, "trust_remote_code": True,
        "max_num_batched_tokens": 64, "dtype": "float", "enforce_eager": False,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING), LLM(checkpoint, **OPTIONS, **others) as llm:
        assert llm.generate("x", GREEDY)
    (notice,) = [record.getMessage() for record in caplog.records if "no meaning here" in record.getMessage()]
    assert "gpu_memory_utilization" in notice and "trust_remote_code" in notice and "enforce_eager" not in notice
    for name, value in (("tensor_parallel_size", 2), ("quantization", "wint4"), ("reasoning_parser", "ernie-x1")):
        with pytest.raises(ValueError, match=f"{name} {value} is not supported: "):
            LLM(checkpoint, **{name: value})
    with pytest.raises(ValueError, match="unknown option 'tensor_parallel'"):
        LLM(checkpoint, tensor_parallel=1)
