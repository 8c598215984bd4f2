"""Fields to SamplingParams: ranges are named as the client named them, the model's own defaults fill the gaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RequestError
from cluster.router.openai.chat import parse_chat
from cluster.router.openai.completions import parse_completion
from cluster.router.openai.sampling import (
    SamplingDefaults,
    draw_seeds,
    load_defaults,
    sampling_params,
    with_bad_words,
)
from engine.request import SamplingParams

VOCAB = 100


def chat(**fields: Any) -> SamplingParams:
    request = parse_chat({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    return sampling_params(request, SamplingDefaults(temperature=0.8, top_k=20), VOCAB)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", 1e9), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", -0.1),
        ("repetition_penalty", 0), ("presence_penalty", 3), ("frequency_penalty", -3), ("n", 0), ("n", 9),
        ("max_tokens", 0), ("max_tokens", -5), ("max_completion_tokens", -5), ("min_tokens", -1),
        ("stop", ["x"] * 10_000), ("stop", "x" * 300), ("stop", ""), ("stop_token_ids", [VOCAB]),
        ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 65), ("logit_bias", {"5": 101}),
        ("logit_bias", {"x": 1}), ("logit_bias", {"-5": 1}), ("logit_bias", {str(VOCAB): 1}),
        ("allowed_token_ids", [VOCAB]), ("allowed_token_ids", [1] * 40_000),
        ("allowed_token_ids", [-1]), ("bad_words", [""]), ("bad_words", ["x"] * 65),
        ("bad_words_token_ids", [VOCAB]), ("bad_words_token_ids", [1] * 129), ("prompt_logprobs", -1),
        ("prompt_logprobs", 21), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**{field: value})
    assert (caught.value.code, caught.value.param) == ("invalid_value", field)
    assert caught.value.message.startswith(field)


def test_too_many_logprobs_are_named_as_the_endpoint_calls_them() -> None:
    with pytest.raises(RequestError) as caught:
        chat(logprobs=True, top_logprobs=21)
    assert caught.value.param == "top_logprobs"
    request = parse_completion({"model": "m", "prompt": "x", "logprobs": 21})
    with pytest.raises(RequestError) as caught:
        sampling_params(request, SamplingDefaults(), VOCAB)
    assert caught.value.param == "logprobs"


def test_defaults_of_the_model_hold_where_the_client_is_silent() -> None:
    params = chat()
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.8, 20, 1.0, None)
    params = chat(temperature=0, top_k=-1, max_completion_tokens=7, max_tokens=5)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, -1, 7)
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).logprobs == 3


def test_generation_config_is_read(tmp_path: Path) -> None:
    assert load_defaults(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_p": None, "do_sample": True}))
    assert load_defaults(tmp_path) == SamplingDefaults(temperature=0.7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    with pytest.raises(ValueError, match=r"generation_config.json: top_p"):
        load_defaults(tmp_path)


def test_seeds_are_the_clients_or_fresh_per_choice() -> None:
    assert draw_seeds(SamplingParams(n=3, seed=5)) == (5, 5, 5)
    drawn = draw_seeds(SamplingParams(n=3))
    assert len(set(drawn)) == 3
    assert chat(seed=-1).seed == (1 << 63) - 1


def test_the_tokenizers_end_tokens_stop_too_unless_they_are_to_be_ignored() -> None:
    body = {"model": "m", "prompt": "x", "stop_token_ids": [5]}
    stopping = sampling_params(parse_completion(body), SamplingDefaults(), VOCAB, (2, 7))
    assert stopping.stop_token_ids == (5, 2, 7)
    ignoring = sampling_params(parse_completion({**body, "ignore_eos": True}), SamplingDefaults(), VOCAB, (2, 7))
    assert ignoring.stop_token_ids == (5,)


def test_the_prompt_is_scored_as_the_client_asks_or_as_an_echo_shows_it() -> None:
    def scored(**fields: Any) -> int | None:
        request = parse_completion({"model": "m", "prompt": "x", **fields})
        return sampling_params(request, SamplingDefaults(), VOCAB).prompt_logprobs

    assert scored() is None and scored(echo=True) is None and scored(logprobs=3) is None
    assert (scored(prompt_logprobs=0), scored(echo=True, logprobs=0), scored(echo=True, logprobs=3)) == (0, 0, 3)
    assert scored(echo=True, logprobs=2, prompt_logprobs=5) == 5


def test_an_echo_may_ask_for_no_answer() -> None:
    request = parse_completion({"model": "m", "prompt": "x", "echo": True, "max_tokens": 0})
    assert request.is_echo_only and sampling_params(request, SamplingDefaults(), VOCAB).max_tokens == 1


def test_bad_words_become_sequences_of_tokens_and_one_that_is_too_long_is_named() -> None:
    params = with_bad_words(chat(bad_words=["x"], bad_words_token_ids=[7]), ((1, 2), (3,)))
    assert params.bad_token_sequences == ((7,), (1, 2), (3,))
    with pytest.raises(RequestError) as caught:
        with_bad_words(params, ((1,) * 40,))
    assert caught.value.param == "bad_words"
