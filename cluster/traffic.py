"""What came in and how it was served over the last seconds: arrivals, tokens, latencies. Pure: time is an argument.

Routers keep one for /status, the simulator one for its planner; the controller adds up what the routers say.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

WINDOW_S = 20.0
SLICE_S = 0.5  # sums are kept per slice of time
MAX_SAMPLES = 1024  # latencies kept; the oldest go first


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Rates and means over `window_s`. Latencies are None where nothing was measured. `num_queued` is of now.

    `prompt_square_ratio` is the mean of the squared prompt lengths over the square of their mean: 1 for prompts that
    are all of one length. Attention costs by the square. `mean_output_tokens` is the mean of the answers that ended, or
    more if those that run say so (_mean_outputs).
    """

    window_s: float = 0.0
    num_requests: int = 0
    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    cached_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    mean_prompt_tokens: float = 0.0
    mean_output_tokens: float | None = None
    prompt_square_ratio: float = 1.0
    ttft_p50_ms: float | None = None
    ttft_p90_ms: float | None = None
    tpot_p50_ms: float | None = None
    tpot_p90_ms: float | None = None
    num_queued: int = 0

    @property
    def cached_share(self) -> float:
        """Of the prompt tokens, those that nobody had to compute."""
        return min(1.0, self.cached_tokens_per_s / self.prompt_tokens_per_s) if self.prompt_tokens_per_s else 0.0


@dataclass(kw_only=True)
class _Slice:
    begin: float
    num_requests: int = 0
    prompt_tokens: int = 0
    prompt_squares: float = 0.0
    cached_tokens: int = 0
    output_tokens: int = 0
    num_ended: int = 0
    ended_outputs: int = 0


class TrafficWindow:
    """Sums over the last `window_s` seconds. Times are monotonic seconds and never go back."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._slices: deque[_Slice] = deque()
        self._ttft: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)
        self._tpot: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)
        self._since: float | None = None
        self._num_running = 0
        self._running_outputs = 0

    def on_request(self, now: float, num_prompt_tokens: int) -> None:
        """A request came, whether it is let in or not."""
        one = self._slice(now)
        one.num_requests += 1
        one.prompt_tokens += num_prompt_tokens
        one.prompt_squares += float(num_prompt_tokens) ** 2

    def on_first_token(self, now: float, ttft_ms: float, num_cached_tokens: int = 0) -> None:
        """An answer began; so many of its prompt's tokens had not to be computed."""
        self._slice(now).cached_tokens += num_cached_tokens
        self._ttft.append((now, ttft_ms))

    def on_begin(self) -> None:
        """A choice begins: `on_tokens` follow, and one `on_end`."""
        self._num_running += 1

    def on_tokens(self, now: float, num_tokens: int) -> None:
        """Tokens came out."""
        self._slice(now).output_tokens += num_tokens
        self._running_outputs += num_tokens

    def on_end(self, now: float, num_tokens: int, tpot_ms: float | None) -> None:
        """A choice that had begun ended, well or not, with as many tokens as `on_tokens` was told of it.

        tpot_ms: from its first to its last token, per token after the first; None if it has none.
        """
        one = self._slice(now)
        one.num_ended += 1
        one.ended_outputs += num_tokens
        self._num_running -= 1
        self._running_outputs -= num_tokens
        if tpot_ms is not None:
            self._tpot.append((now, tpot_ms))

    def traffic(self, now: float, *, num_queued: int = 0) -> Traffic:
        """The figures as of `now`. A window that has just begun is as long as it has lasted, at least a second."""
        self._forget(now)
        if self._since is None:
            return Traffic(num_queued=num_queued)
        window_s = max(1.0, min(self._window_s, now - self._since))
        num = sum(one.num_requests for one in self._slices)
        prompts = sum(one.prompt_tokens for one in self._slices)
        squares = sum(one.prompt_squares for one in self._slices)
        outputs = sum(one.output_tokens for one in self._slices)
        ttft, tpot = (sorted(value for _, value in samples) for samples in (self._ttft, self._tpot))
        return Traffic(
            window_s=window_s,
            num_requests=num,
            requests_per_s=num / window_s,
            prompt_tokens_per_s=prompts / window_s,
            cached_tokens_per_s=sum(one.cached_tokens for one in self._slices) / window_s,
            output_tokens_per_s=outputs / window_s,
            mean_prompt_tokens=prompts / num if num else 0.0,
            mean_output_tokens=self._mean_outputs(outputs),
            prompt_square_ratio=max(1.0, squares * num / prompts**2) if prompts else 1.0,
            ttft_p50_ms=quantile(ttft, 0.5),
            ttft_p90_ms=quantile(ttft, 0.9),
            tpot_p50_ms=quantile(tpot, 0.5),
            tpot_p90_ms=quantile(tpot, 0.9),
            num_queued=num_queued,
        )

    def _mean_outputs(self, outputs: int) -> float | None:
        """Answers that have become longer show while they run. None while nothing has ended.

        What came out over what ended would be the mean if lengths were exponential (maximum likelihood, lifetimes cut
        short counted with what they have). Of other lengths it says far too much while few have ended: so no more than
        twice what those that run have, whose mean age is half their length at the least.
        """
        num_ended = sum(one.num_ended for one in self._slices)
        if not num_ended:
            return None
        mean = sum(one.ended_outputs for one in self._slices) / num_ended
        if self._num_running:
            mean = max(mean, min(outputs / num_ended, 2 * self._running_outputs / self._num_running))
        return mean

    def _slice(self, now: float) -> _Slice:
        if self._since is None:
            self._since = now
        if not self._slices or now >= self._slices[-1].begin + SLICE_S:
            self._forget(now)
            self._slices.append(_Slice(begin=now))
        return self._slices[-1]

    def _forget(self, now: float) -> None:
        begin = now - self._window_s
        while self._slices and self._slices[0].begin <= begin:
            self._slices.popleft()
        for samples in (self._ttft, self._tpot):
            while samples and samples[0][0] <= begin:
                samples.popleft()


def quantile(ascending: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of them do not exceed; None of nothing."""
    if not ascending:
        return None
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def added(parts: Iterable[Traffic]) -> Traffic:
    """What several routers say, as one: rates add up; means and latencies are weighted by requests."""
    some = [part for part in parts if part.num_requests or part.num_queued]
    if len(some) <= 1:
        return some[0] if some else Traffic()
    num = sum(part.num_requests for part in some)
    rate = sum(part.requests_per_s for part in some)
    prompt_rate = sum(part.prompt_tokens_per_s for part in some)
    mean_prompt = prompt_rate / rate if rate else 0.0
    squares = _mean(some, lambda part: part.prompt_square_ratio * part.mean_prompt_tokens**2)
    return Traffic(
        window_s=max(part.window_s for part in some),
        num_requests=num,
        requests_per_s=rate,
        prompt_tokens_per_s=prompt_rate,
        cached_tokens_per_s=sum(part.cached_tokens_per_s for part in some),
        output_tokens_per_s=sum(part.output_tokens_per_s for part in some),
        mean_prompt_tokens=mean_prompt,
        mean_output_tokens=_mean(some, lambda part: part.mean_output_tokens),
        prompt_square_ratio=max(1.0, (squares or 0.0) / mean_prompt**2) if mean_prompt else 1.0,
        ttft_p50_ms=_mean(some, lambda part: part.ttft_p50_ms),
        ttft_p90_ms=_mean(some, lambda part: part.ttft_p90_ms),
        tpot_p50_ms=_mean(some, lambda part: part.tpot_p50_ms),
        tpot_p90_ms=_mean(some, lambda part: part.tpot_p90_ms),
        num_queued=sum(part.num_queued for part in some),
    )


def _mean(parts: list[Traffic], value_of: Callable[[Traffic], float | None]) -> float | None:
    """Weighted by requests; parts that measured nothing are left out."""
    pairs = [(value, part.num_requests) for part in parts if (value := value_of(part)) is not None]
    weight = sum(num for _, num in pairs)
    return sum(value * num for value, num in pairs) / weight if weight else None
