"""Answers to held-out questions and the figures made of them. No torch, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.tiny.skills.checks import contains_answer, is_correct
from engine.tiny.skills.example import Example
from engine.tiny.skills.mix import SKILLS, held_out
from engine.tiny.skills.rendering import answer_text


@dataclass(frozen=True)
class Outcome:
    """One question and the model's whole answer; `error` says why there is none, and counts as wrong."""

    example: Example
    text: str = ""
    error: str = ""

    @cached_property
    def correct(self) -> bool:
        """Exact match, by the example's check."""
        return not self.error and is_correct(self.example, self.text)

    @cached_property
    def contained(self) -> bool:
        """Right, or the expected text stands somewhere in the answer."""
        return self.correct or (not self.error and contains_answer(self.example, self.text))

    def as_json(self) -> dict[str, Any]:
        """Everything about it."""
        return {
            "question": list(self.example.messages[:-1]),
            "expected": answer_text(self.example.messages[-1]),
            "answer": self.text,
            "correct": self.correct,
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True)
class SkillFigures:
    """Counts of one skill: `correct` and `contained` of `asked`; `failed` ones have no answer and are in neither."""

    skill: str
    outcomes: tuple[Outcome, ...]

    @property
    def asked(self) -> int:
        return len(self.outcomes)

    @cached_property
    def correct(self) -> int:
        return sum(one.correct for one in self.outcomes)

    @cached_property
    def contained(self) -> int:
        return sum(one.contained for one in self.outcomes)

    @cached_property
    def failed(self) -> int:
        return sum(bool(one.error) for one in self.outcomes)

    @property
    def accuracy(self) -> float:
        """Exact matches of those asked, in [0, 1]."""
        return self.correct / self.asked

    @property
    def first_wrong(self) -> Outcome | None:
        """One answer to look at."""
        return next((one for one in self.outcomes if not one.correct), None)


def chosen_skills(text: str) -> tuple[str, ...]:
    """Skills of a list with commas; all for an empty one. Raises ValueError for an unknown name."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in SKILLS]
    if unknown:
        raise ValueError(f"there is no skill {unknown[0]}; the skills are {', '.join(SKILLS)}")
    return names or SKILLS


def questions(skills: Sequence[str], count: int) -> list[Example]:
    """Up to `count` held-out questions of each skill, always the same."""
    return [example for skill in skills for example in held_out(skill, count)]


def figures(outcomes: Sequence[Outcome]) -> list[SkillFigures]:
    """By skill, in the order of their first questions."""
    by_skill: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_skill.setdefault(outcome.example.skill, []).append(outcome)
    return [SkillFigures(skill=skill, outcomes=tuple(found)) for skill, found in by_skill.items()]


def as_json(found: Sequence[SkillFigures], about: Mapping[str, object]) -> dict[str, Any]:
    """`about` (what was asked and how), the figures by skill, and every answer."""
    return {
        **about,
        "accuracy": sum(one.correct for one in found) / max(sum(one.asked for one in found), 1),
        "skills": {
            one.skill: {
                "accuracy": one.accuracy,
                "asked": one.asked,
                "correct": one.correct,
                "contained": one.contained,
                "failed": one.failed,
            }
            for one in found
        },
        "answers": {one.skill: [outcome.as_json() for outcome in one.outcomes] for one in found},
    }


def points_lost(found: Sequence[SkillFigures], earlier: Mapping[str, Any]) -> dict[str, float]:
    """Percentage points by which a skill is worse than in an earlier report (`as_json`); negative where it is better.

    Raises ValueError for a report that is none, or that asked other numbers of questions.
    """
    lost = {}
    for one in found:
        try:
            was, asked = float(earlier["skills"][one.skill]["accuracy"]), int(earlier["skills"][one.skill]["asked"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the earlier report says nothing of {one.skill}") from error
        if asked != one.asked:
            raise ValueError(f"the earlier report asked {asked} questions of {one.skill}, this one {one.asked}")
        lost[one.skill] = 100 * (was - one.accuracy)
    return lost
