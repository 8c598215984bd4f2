"""What training sees and what is asked are disjoint, the same for a seed, and mixed as the shares say."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest

from engine.tiny.skills import SKILLS, TRAINING_MIX, held_out, held_out_lookups, training_examples
from engine.tiny.skills.example import Example, Split, is_held_out

NUM_TRAINED = 40_000
FACT_LIKE = ("multiplication", "facts", "tool-call", "tool-result")


def asked(example: Example) -> list[str]:
    """Every question of a conversation, with all that it refers to."""
    turns = example.messages
    if example.skill in ("memory", "lookup", "small-talk", "tools", "tool-result", "tool-call"):
        return [json.dumps(turns[:end]) for end in range(1, len(turns), 2)]
    return [turn["content"] for turn in turns if turn["role"] == "user"]


def test_no_held_out_question_is_trained() -> None:
    questions: set[str] = set()
    keys: set[str] = set()
    for skill in SKILLS:
        for example in held_out(skill, 100):
            questions.add(asked(example)[-1])
            keys.update(example.keys)
    for seed in range(4):
        for example in itertools.islice(training_examples(seed), NUM_TRAINED // 4):
            assert keys.isdisjoint(example.keys), example
            assert questions.isdisjoint(asked(example)), example


@pytest.mark.long
def test_no_held_out_question_is_trained_in_many_examples() -> None:
    keys = {key for skill in SKILLS for example in held_out(skill, 200) for key in example.keys}
    for example in itertools.islice(training_examples(99), 400_000):
        assert keys.isdisjoint(example.keys), example


@pytest.mark.parametrize("skill", sorted(set(SKILLS) - set(FACT_LIKE)))
def test_held_out_keys_are_those_of_the_held_out_tenth(skill: str) -> None:
    assert all(is_held_out(example.keys[-1]) for example in held_out(skill, 30))


def test_a_thought_or_a_tool_result_never_shows_a_held_out_sum() -> None:
    hidden = {example.keys[0] for example in held_out("addition", 200)}
    for example in itertools.islice(training_examples(5), 10_000):
        for message in example.messages:
            for step in message.get("reasoning_content", "").splitlines():
                left, right = step.partition(" = ")[0].split(" + ")
                assert f"{min(int(left), int(right))}+{max(int(left), int(right))}" not in hidden


def test_the_seed_decides_all() -> None:
    def first(seed: int) -> list[Example]:
        return list(itertools.islice(training_examples(seed), 300))

    assert first(3) == first(3)
    assert first(3) != first(4)
    assert held_out("lookup-16", 20) == held_out("lookup-16", 20)


def test_a_held_out_set_has_different_questions() -> None:
    for skill in SKILLS:
        questions = [str(example.messages[:-1]) for example in held_out(skill, 60)]
        assert len(set(questions)) == len(questions) == 60, skill


def test_every_skill_is_asked_by_its_name() -> None:
    assert all(example.skill == skill for skill in SKILLS for example in held_out(skill, 5))
    with pytest.raises(ValueError, match="there is no skill 'poetry'"):
        held_out("poetry", 1)


def test_lists_are_as_long_as_asked_for() -> None:
    def longest(most_pairs: int) -> int:
        drawn = itertools.islice(training_examples(0, most_pairs), 3000)
        return max(example.messages[0]["content"].count(",") + 1 for example in drawn if example.skill == "lookup")

    assert longest(6) == 6
    assert longest(200) > 150
    lists = held_out_lookups(48, 5)
    assert [example.messages[0]["content"].count(",") + 1 for example in lists] == [48] * 5


def test_shares_are_followed_and_can_be_changed() -> None:
    usual = Counter(example.skill for example in itertools.islice(training_examples(0), 3000))
    more = Counter(example.skill for example in itertools.islice(training_examples(0, shares={"sorting": 40.0}), 3000))
    assert set(usual) == set(TRAINING_MIX)
    assert more["sorting"] > 4 * usual["sorting"]


def test_the_held_out_phrasing_is_the_only_one_that_training_leaves_out() -> None:
    rng = random.Random(0)
    trained = {Split(held_out=False).pick(rng, 5, held_out=2) for _ in range(200)}
    assert trained == {0, 1, 3, 4}
    assert Split(held_out=True).pick(rng, 5, held_out=2) == 2
