"""Outcomes are counted by skill; failed ones are wrong; an earlier report is compared with."""

from __future__ import annotations

import json

import pytest

from engine.evaluation.report import Outcome, as_json, chosen_skills, figures, points_lost, questions
from engine.tiny.skills import SKILLS, held_out


def outcomes() -> list[Outcome]:
    """Addition: one right, one that says more, one wrong, one without an answer; facts: all right."""
    a, b, c, d = held_out("addition", 4)
    sums = [
        Outcome(a, text=a.answer),
        Outcome(b, text=f"It is {b.answer}."),
        Outcome(c, text=f"{c.answer}1"),
        Outcome(d, error="HTTP 500"),
    ]
    return [*sums, *(Outcome(one, text=one.answer) for one in held_out("facts", 2))]


def test_outcomes_are_counted_by_skill() -> None:
    addition, facts = figures(outcomes())
    assert (addition.skill, addition.asked, addition.correct, addition.contained, addition.failed) == (
        "addition",
        4,
        1,
        2,
        1,
    )
    assert addition.accuracy == 0.25
    assert addition.first_wrong is not None and addition.first_wrong.text.startswith("It is")
    assert facts.accuracy == 1.0 and facts.first_wrong is None


def test_the_report_holds_every_answer_and_survives_json() -> None:
    report = json.loads(json.dumps(as_json(figures(outcomes()), {"target": "x"}), ensure_ascii=False))
    assert report["target"] == "x"
    assert report["accuracy"] == 0.5
    assert report["skills"]["addition"]["failed"] == 1
    assert [answer["correct"] for answer in report["answers"]["addition"]] == [True, False, False, False]
    assert report["answers"]["addition"][3]["error"] == "HTTP 500"


def test_points_are_lost_against_an_earlier_report() -> None:
    found = figures(outcomes())
    earlier = as_json(found, {})
    assert points_lost(found, earlier) == {"addition": 0.0, "facts": 0.0}
    earlier["skills"]["addition"]["accuracy"] = 0.75
    assert points_lost(found, earlier)["addition"] == 50.0


@pytest.mark.parametrize("change", [{"skills": {}}, {"skills": None}])
def test_a_report_that_says_nothing_of_a_skill_is_refused(change: dict[str, object]) -> None:
    found = figures(outcomes())
    with pytest.raises(ValueError, match="says nothing of addition"):
        points_lost(found, as_json(found, {}) | change)


def test_a_report_of_another_number_of_questions_is_refused() -> None:
    found = figures(outcomes())
    with pytest.raises(ValueError, match="asked 4 questions of addition, this one 3"):
        points_lost(figures(outcomes()[1:4]), as_json(found, {}))


def test_skills_are_chosen_by_name() -> None:
    assert chosen_skills("") == SKILLS
    assert chosen_skills(" facts, addition,facts") == ("facts", "addition")
    with pytest.raises(ValueError, match="there is no skill poems"):
        chosen_skills("facts,poems")
    assert [example.skill for example in questions(("facts", "json"), 2)] == ["facts", "facts", "json", "json"]
