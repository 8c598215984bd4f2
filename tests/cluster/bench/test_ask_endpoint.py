"""An endpoint is asked every question once, some at a time; whatever it does becomes an outcome."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from cluster.bench.ask_endpoint import AskOptions, EndpointError, ask_endpoint, base_url
from engine.evaluation.report import Outcome, figures, questions
from engine.tiny.skills import Example

URL = "http://fake/v1"
Handler = Callable[[httpx2.Request], httpx2.Response]


class FakeEndpoint:
    """Knows the answers; `spoil` may put another reply in a question's place. Counts what runs at once."""

    def __init__(self, examples: list[Example], spoil: Callable[[int, str], httpx2.Response | None]) -> None:
        self._examples = examples
        self._spoil = spoil
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.most_at_once = self._at_once = 0

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": "served"}]})
        body = json.loads(request.content)
        self.bodies.append((request.url.path, body))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0)
        self._at_once -= 1
        index = next(index for index, one in enumerate(self._examples) if self._is_asked(one, body))
        answer = self._examples[index].answer
        spoiled = self._spoil(index, answer)
        if spoiled is not None:
            return spoiled
        if request.url.path == "/v1/completions":
            return httpx2.Response(200, json={"choices": [{"text": f"<tool_call>\n{answer}\n</tool_call>"}]})
        return chat(answer)

    def _is_asked(self, example: Example, body: dict[str, Any]) -> bool:
        question = example.messages[-2]["content"]
        return question in (body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


def chat(text: str, **more: str) -> httpx2.Response:
    return httpx2.Response(200, json={"choices": [{"message": {"role": "assistant", "content": text, **more}}]})


def ask(fake: FakeEndpoint, examples: list[Example], **options: Any) -> list[Outcome]:
    asked = ask_endpoint(
        examples, AskOptions(url=URL, **options), lambda skill: None, transport=httpx2.MockTransport(fake)
    )
    return asyncio.run(asked)


def test_right_wrong_and_failed_answers_are_counted() -> None:
    examples = questions(("facts",), 8)
    replies = {
        1: chat("nonsense"),
        2: httpx2.Response(500, json={"error": {"message": "worker lost"}}),
        3: httpx2.Response(200, text="<html>"),
        4: httpx2.Response(200, json={"choices": []}),
    }
    fake = FakeEndpoint(examples, lambda index, answer: replies.get(index))
    outcomes = ask(fake, examples)
    (facts,) = figures(outcomes)
    assert [one.example for one in outcomes] == examples
    assert (facts.asked, facts.correct, facts.failed) == (8, 4, 3)
    assert "worker lost" in outcomes[2].error
    assert all(body["model"] == "served" and body["temperature"] == 0.0 for _, body in fake.bodies)


def test_a_request_that_takes_too_long_fails_alone() -> None:
    examples = questions(("facts",), 3)

    class Slow(FakeEndpoint):
        async def __call__(self, request: httpx2.Request) -> httpx2.Response:
            if request.url.path != "/v1/models" and examples[1].messages[0]["content"] in request.content.decode():
                await asyncio.sleep(60)
            return await super().__call__(request)

    outcomes = ask(Slow(examples, lambda index, answer: None), examples, timeout_s=0.5)
    assert [one.correct for one in outcomes] == [True, False, True]
    assert outcomes[1].error == "no answer within 0.5 s"


def test_a_connection_that_breaks_fails_alone() -> None:
    examples = questions(("facts",), 3)

    def broken(index: int, answer: str) -> None:
        if index == 0:
            raise httpx2.ReadError("reset")

    outcomes = ask(FakeEndpoint(examples, broken), examples)
    assert [one.correct for one in outcomes] == [False, True, True]
    assert "reset" in outcomes[0].error


def test_no_more_than_the_given_requests_run_at_once() -> None:
    examples = questions(("facts",), 20)
    fake = FakeEndpoint(examples, lambda index, answer: None)
    assert all(one.correct for one in ask(fake, examples, concurrency=3))
    assert fake.most_at_once <= 3


def test_tools_are_asked_as_text_and_thinking_by_the_templates_switch() -> None:
    examples = questions(("tool-call", "thinking"), 1)
    fake = FakeEndpoint(examples, lambda index, answer: chat(answer, reasoning_content="steps") if index else None)
    outcomes = ask(fake, examples)
    assert all(one.correct for one in outcomes)
    (path, call), (chat_path, thought) = fake.bodies
    assert path == "/v1/completions" and "<tool_list>" in call["prompt"]
    assert chat_path == "/v1/chat/completions" and thought["chat_template_kwargs"] == {"enable_thinking": True}


def test_an_endpoint_without_a_model_cannot_be_asked() -> None:
    def nothing(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={"data": []})

    asked = ask_endpoint([], AskOptions(url=URL), lambda skill: None, transport=httpx2.MockTransport(nothing))
    with pytest.raises(EndpointError, match="names no model"):
        asyncio.run(asked)


@pytest.mark.parametrize("given", ["127.0.0.1:8180", "http://127.0.0.1:8180/", "http://127.0.0.1:8180/v1"])
def test_an_url_is_understood_with_and_without_v1(given: str) -> None:
    assert base_url(given) == "http://127.0.0.1:8180/v1"


def test_another_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="expected http"):
        base_url("ftp://x")
