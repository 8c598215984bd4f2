"""Stop strings against a plain scan of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.stop_strings import StopStrings

ALPHABET = st.sampled_from("aab好🎉")


def plain_scan(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the match that is complete first, and whether there is one."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def stream(deltas: list[str], stops: list[str]) -> tuple[str, bool]:
    scan, shown = StopStrings(stops), ""
    for delta in deltas:
        text, stopped = scan.push(delta)
        shown += text
        if stopped:
            return shown, True
    return shown + scan.flush(), False


@settings(max_examples=120, deadline=None)
@given(
    deltas=st.lists(st.text(ALPHABET, max_size=6), max_size=10),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4),
)
def test_the_outcome_is_a_plain_scans_however_the_text_is_cut(deltas: list[str], stops: list[str]) -> None:
    expected = plain_scan("".join(deltas), stops)
    assert stream(deltas, stops) == expected
    assert stream(list("".join(deltas)), stops) == expected


@settings(max_examples=120, deadline=None)
@given(deltas=st.lists(st.text(ALPHABET, max_size=6), max_size=10), stop=st.text(ALPHABET, min_size=1, max_size=5))
def test_only_what_may_become_a_stop_string_is_held_back(deltas: list[str], stop: str) -> None:
    scan, seen, shown = StopStrings([stop]), "", ""
    for delta in deltas:
        text, stopped = scan.push(delta)
        seen, shown = seen + delta, shown + text
        if stopped:
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown) and stop.startswith(held) and held != stop
        longest = max(size for size in range(len(stop)) if seen.endswith(stop[:size]))
        assert len(held) == longest


@pytest.mark.parametrize(
    ("deltas", "stops", "shown"),
    [
        (["hello wor", "ld"], ["o w"], "hell"),
        (["用户", "、你好"], ["户、"], "用"),
        (["abc", "d"], ["abcd", "bc"], "a"),
        (["xab"], ["ab", "b"], "x"),
        (["aaab"], ["aab"], "a"),
        (["stop"], ["stop"], ""),
    ],
)
def test_text_ends_before_the_first_complete_match(deltas: list[str], stops: list[str], shown: str) -> None:
    assert stream(deltas, stops) == (shown, True)


def test_nothing_follows_a_stop() -> None:
    scan = StopStrings(["x"])
    assert scan.matched is None
    assert scan.push("axb") == ("a", True)
    assert scan.push("more") == ("", True) and scan.flush() == "" and scan.matched == "x"


def test_the_longest_of_several_that_end_together_is_named() -> None:
    scan = StopStrings(["b", "ab", "zzz"])
    assert scan.push("xxab") == ("xx", True) and scan.matched == "ab"


def test_without_stop_strings_text_passes_through() -> None:
    scan = StopStrings([])
    assert scan.push("abc") == ("abc", False) and scan.flush() == ""
