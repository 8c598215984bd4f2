"""Ends a text at the first stop string, in a stream of deltas, holding back only what may still become one."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Scans one text. The match that is complete first ends it (of several at once the one that began first).

    So the outcome doesn't depend on how the text was cut into deltas. One pass, constant cost per character and stop.
    `matched` is the stop string that ended it, None until then.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns (text that can be shown now, whether a stop string was met). Nothing is shown after one."""
        if self.matched is not None:
            return "", True
        if not self._patterns:
            return text, False
        known = self._held + text
        for index, char in enumerate(text, start=len(self._held)):
            complete = [pattern.text for pattern in self._patterns if pattern.advance(char)]
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return known[: index + 1 - len(self.matched)], True
        num_held = max(pattern.num_matched for pattern in self._patterns)
        self._held = known[len(known) - num_held :]
        return known[: len(known) - num_held], False

    def flush(self) -> str:
        """The text held back, when the stream ends without a stop string."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """How much of one stop string the text ends with (Knuth, Morris, Pratt)."""

    def __init__(self, text: str) -> None:
        assert text, "validated in SamplingParams: a stop string is not empty"
        self.num_matched = 0
        self.text = text
        self._border = [0] * (len(text) + 1)  # of text[:i]: its longest proper prefix that is also its suffix
        for index in range(1, len(text)):
            self._border[index + 1] = self._step(self._border[index], text[index])

    def advance(self, char: str) -> bool:
        """Take one character; whether the stop string is complete now."""
        self.num_matched = self._step(self.num_matched, char)
        return self.num_matched == len(self.text)

    def _step(self, matched: int, char: str) -> int:
        while matched and (matched == len(self.text) or self.text[matched] != char):
            matched = self._border[matched]
        return matched + 1 if self.text[matched] == char else 0
