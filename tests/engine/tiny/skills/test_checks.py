"""Each skill's check accepts its own answer and refuses near misses."""

from __future__ import annotations

import pytest

from engine.tiny.skills import SKILLS, contains_answer, held_out, is_correct
from engine.tiny.skills.checks import final_answer
from engine.tiny.skills.rendering import END, answer_text, segments


@pytest.mark.parametrize("skill", SKILLS)
def test_a_skills_own_answer_is_right_and_a_near_miss_is_not(skill: str) -> None:
    for example in held_out(skill, 20):
        answer = answer_text(example.messages[-1])
        assert is_correct(example, answer)
        assert is_correct(example, f" {answer}\n")
        thought, mark, said = answer.rpartition("</think>")
        for wrong in ("", "x" + said, said + "0", said[:-1], f"{said} {said}"):
            assert not is_correct(example, thought + mark + wrong), wrong


@pytest.mark.parametrize("skill", SKILLS)
def test_another_questions_answer_is_wrong(skill: str) -> None:
    one, *others = held_out(skill, 30)
    for other in others:
        same = other.answer == one.answer
        assert is_correct(one, answer_text(other.messages[-1])) == same


def test_json_is_compared_as_an_object_with_its_types() -> None:
    example = next(one for one in held_out("json", 40) if '"age"' in one.answer and '"name"' in one.answer)
    age = example.answer.partition('"age": ')[2].partition(",")[0].rstrip("}")
    assert is_correct(example, example.answer.replace(" ", ""))
    assert not is_correct(example, example.answer.replace(f'"age": {age}', f'"age": "{age}"'))
    assert not is_correct(example, example.answer.replace(f'"age": {age}', f'"age": {age}.0'))
    assert not is_correct(example, "[" * 100_000)


def test_a_thought_without_an_end_is_wrong_and_the_thought_itself_does_not_count() -> None:
    example = held_out("thinking", 1)[0]
    assert not is_correct(example, example.answer)
    assert is_correct(example, f"whatever 99\n</think>\n\n{example.answer}")
    assert not is_correct(example, f"{example.answer}\n</think>\n\n0")
    assert final_answer("a</think>\n<response>\nb\n</response>\n") == "b"


def test_containing_the_answer_is_weaker_than_being_it() -> None:
    example = held_out("addition", 1)[0]
    said = f"The sum is {example.answer}."
    assert contains_answer(example, said)
    assert not is_correct(example, said)
    assert not contains_answer(example, f"The sum is {example.answer}0.")


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_end_with_the_end_token(skill: str) -> None:
    pieces = segments(held_out(skill, 1)[0])
    assert pieces[-1][1]
    assert pieces[-1][0].endswith(END)
