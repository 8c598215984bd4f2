"""An engine in this process is asked through its own chat template; what it refuses is an error of that question."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.evaluation.offline import ask_engine
from engine.evaluation.report import figures, questions
from engine.llm import LLM
from engine.text.chat_template import ERNIE_TEXT_TEMPLATE
from engine.tiny.byte_tokenizer import write_byte_tokenizer
from engine.tiny.random_checkpoint import make_random_checkpoint

CONTEXT = 1024  # too short for some of the lists, at one token a byte


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("model")
    make_random_checkpoint(folder, vocab_size=write_byte_tokenizer(folder))
    (folder / "chat_template.jinja").write_text(ERNIE_TEXT_TEMPLATE)
    with LLM(folder, max_model_len=CONTEXT, kv_cache_bytes=16 << 20) as made:
        yield made


def test_each_question_gets_an_outcome_in_its_place(llm: LLM) -> None:
    asked = questions(("addition", "thinking", "tool-call"), 3)
    told: list[str] = []
    outcomes = ask_engine(llm, asked, max_tokens=4, tell=told.append)
    assert [one.example for one in outcomes] == asked
    assert told == ["addition", "thinking", "tool-call"]
    assert not any(one.error for one in outcomes)
    assert all(not one.correct for one in figures(outcomes)), "a random model knows nothing"


def test_a_prompt_that_is_too_long_fails_alone(llm: LLM) -> None:
    asked = [*questions(("lookup-16",), 2), *questions(("lookup-200",), 1)]
    asked = [replace(one, skill="mixed") for one in asked]
    outcomes = ask_engine(llm, asked, max_tokens=2, tell=lambda skill: None)
    assert ["tokens" in one.error for one in outcomes] == [False, False, True]


def test_a_role_that_the_template_does_not_know_fails_alone(llm: LLM) -> None:
    outcomes = ask_engine(llm, questions(("tool-result",), 2), max_tokens=2, tell=lambda skill: None)
    assert all("tool" in one.error for one in outcomes)
