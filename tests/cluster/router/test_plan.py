"""The plan of a request: what fits, what it costs, how long it may take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.errors import RequestError
from cluster.router.openai.chat import parse_chat
from cluster.router.openai.completions import parse_completion
from cluster.router.openai.sampling import SamplingDefaults, sampling_params
from cluster.router.plan import MAX_TIMEOUT_MS, Plan, check_cost, make_plan, parse_timeout

CONTEXT = 100


def plan(prompts: list[list[int]], *, chat: bool = False, **fields: Any) -> Plan:
    if chat:
        request: Any = parse_chat({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    else:
        request = parse_completion({"model": "m", "prompt": prompts, **fields})
    params = sampling_params(request, SamplingDefaults(), 0)
    return make_plan(request, prompts, params, request_id="id", max_model_len=CONTEXT, deadline=1.0)


def test_a_chat_may_fill_the_context_and_a_completion_has_16_tokens() -> None:
    assert plan([[1] * 30], chat=True).params.max_tokens == 70
    assert plan([[1] * 30]).params.max_tokens == 16
    assert plan([[1] * 95]).params.max_tokens == 5  # a default shrinks to what fits


@pytest.mark.parametrize(
    ("size", "fields", "param"),
    [
        (CONTEXT, {}, "prompt"),
        (CONTEXT + 50, {}, "prompt"),
        (30, {"max_tokens": 71}, "max_tokens"),
        (30, {"min_tokens": 71, "max_tokens": 90}, "max_tokens"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(size: int, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan([[1] * size], **fields)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)


def test_min_tokens_and_max_completion_tokens_of_a_chat_must_fit() -> None:
    for fields, param in (({"min_tokens": 80}, "min_tokens"), ({"max_completion_tokens": 71}, "max_completion_tokens")):
        with pytest.raises(RequestError) as caught:
            plan([[1] * 30], chat=True, **fields)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)


def test_prompts_become_little_endian_ids_with_own_request_ids() -> None:
    made = plan([[1, 2], [3]], n=2)
    assert [np.frombuffer(prompt, "<i4").tolist() for prompt in made.prompts] == [[1, 2], [3]]
    assert (made.num_choices, made.num_prompt_tokens) == (4, 3)
    assert [made.sub_id(0), made.sub_id(1)] == ["id-0", "id-1"]
    assert plan([[1]]).sub_id(0) == "id"
    assert len({seed for seeds in made.seeds for seed in seeds}) == 4


def test_cost_is_checked_before_anything_is_tokenised() -> None:
    request = parse_completion({"model": "m", "prompt": "x", "max_tokens": 90, "n": 8})
    with pytest.raises(RequestError) as caught:
        check_cost(request, [(1_000_000, False)], CONTEXT, "prompt")
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError) as caught:
        check_cost(request, [(5, True)] * 32, CONTEXT, "prompt")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "n")
    check_cost(request, [(5, True)] * 4, CONTEXT, "prompt")


def test_the_timeout_header_is_bounded() -> None:
    assert parse_timeout(None, 600.0) == 600.0
    assert parse_timeout("1500", 600.0) == 1.5
    for value in ("0", "-1", "x", "1.5", "", str(MAX_TIMEOUT_MS + 1), "9" * 50, "\u0661"):
        with pytest.raises(RequestError) as caught:
            parse_timeout(value, 600.0)
        assert caught.value.param == "x-neap-timeout-ms"
