"""Requests of every kind at once, and what each must answer: what the same request answered when nothing happened.

Two waves, so that a fault meets requests in all states: the first decodes when the second arrives with its prompts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from tests.integration.fault_cluster import Answer, FaultCluster

Body = dict[str, Any]
EVENTS_BEFORE = 10  # that each of the first wave has got when the second begins


def bodies(number: int, *, num_prompt: int, max_tokens: int) -> list[Body]:
    """Greedy and sampled, with penalties, logprobs and (see `Load.learn`) stop strings; distinct prompts."""
    kinds: list[Body] = [
        {"temperature": 0},
        {"temperature": 0.9},
        {"temperature": 0, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"temperature": 0.8, "logprobs": 2, "top_p": 0.9},
        {"temperature": 0, "stop": []},
        {"temperature": 0.9, "stop": [], "repetition_penalty": 1.2},
    ]
    made = []
    for i in range(number):
        prompt = [30 + (i * 37 + position * (i + 3) + position * position // 7) % 200 for position in range(num_prompt)]
        common = {"prompt": prompt, "max_tokens": max_tokens, "seed": i, "ignore_eos": True}
        made.append(common | kinds[i % len(kinds)])
    return made


class Load:
    """The same requests again and again, each time under another cache salt: nothing is left of the time before."""

    def __init__(self, cluster: FaultCluster, number: int, *, num_prompt: int = 300, max_tokens: int = 250) -> None:
        self._cluster = cluster
        self._bodies = bodies(number, num_prompt=num_prompt, max_tokens=max_tokens)
        self._expected: list[Answer] = []
        self._num_runs = 0

    async def learn(self) -> None:
        """Ask without a fault. Stop strings are pieces of the answers, somewhat after the middle."""
        self._expected = answers = await self._cluster.ask_all(self._salted())
        for body, answer in zip(self._bodies, answers, strict=True):
            assert answer.error is None and answer.has_done, answer
            if "stop" in body:
                middle = len(answer.text) * 6 // 10
                found = re.search(r"[0-9A-Za-z ]{2}", answer.text[middle:])
                assert found is not None, "a text without two letters in a row"
                body["stop"] = [found.group()]
        if any("stop" in body for body in self._bodies):
            self._expected = await self._cluster.ask_all(self._salted())
        for body, answer in zip(self._bodies, self._expected, strict=True):
            assert answer.finish == ("stop" if "stop" in body else "length")

    def _salted(self) -> list[Body]:
        self._num_runs += 1
        return [body | {"cache_salt": f"run {self._num_runs}"} for body in self._bodies]

    async def run(self, fault: Callable[[list[Answer]], Any], *, errors: frozenset[str] = frozenset()) -> list[Answer]:
        """Ask in two waves and await `fault(answers)` as soon as the second is on its way. Checks every answer."""
        answers = [Answer() for _ in self._bodies]
        asked = list(zip(self._salted(), answers, strict=True))
        half = len(asked) // 2
        tasks = [asyncio.create_task(self._cluster.ask(body, answer)) for body, answer in asked[:half]]
        await self._cluster.until(
            lambda: all(answer.num_events >= EVENTS_BEFORE for answer in answers[:half]), "no tokens come"
        )
        tasks += [asyncio.create_task(self._cluster.ask(body, answer)) for body, answer in asked[half:]]
        await asyncio.sleep(0.03)
        await fault(answers)
        await asyncio.gather(*tasks)
        self.check(answers, errors=errors)
        return answers

    def check(self, answers: list[Answer], *, errors: frozenset[str] = frozenset()) -> None:
        """Every answer is exactly the undisturbed one; or it failed with one of `errors`, after a true beginning."""
        for i, (answer, expected) in enumerate(zip(answers, self._expected, strict=True)):
            if answer.error in errors and answer.error is not None:
                assert expected.text.startswith(answer.text), f"request {i} failed after a wrong text"
                continue
            assert answer.told == expected.told, f"request {i}: {answer.error} {answer.text!r} != {expected.text!r}"
