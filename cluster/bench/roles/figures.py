"""What a recorded trace is like, as a few hundred numbers, and requests drawn from them.

`traces.json` beside this file holds the figures of two public traces, so that the bench needs no trace:

    prompts   quantiles of prompt lengths, at SHARES (closer together in the tail, which weighs much)
    outputs   the same of answer lengths, for each eighth of the requests by prompt length: the two are not independent
    gaps      the same of the times between arrivals over their mean: burstiness

Made by `python -m cluster.bench.roles.figures AzureLLMInferenceTrace_code.csv conversation_trace.jsonl`. Between two
quantiles lengths are drawn evenly; arrivals are a renewal process (gaps are drawn independently).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.bench.workload import Arrival, read_trace

FILE = Path(__file__).parent / "traces.json"
NUM_BANDS = 8
_EVEN, _TAIL = (i / 20 for i in range(19)), (round(0.9 + i / 100, 2) for i in range(1, 10))
SHARES = (*_EVEN, *_TAIL, *(round(0.99 + i / 1000, 3) for i in range(10)), 0.9995, 1.0)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TraceFigures:
    """One trace, at SHARES. Lengths in tokens; gaps over their mean."""

    name: str
    source: str
    requests: int
    span_s: float
    prompts: tuple[float, ...]
    outputs: tuple[tuple[float, ...], ...]
    gaps: tuple[float, ...]

    def sample(self, rng: Random, rate: float, seconds: float) -> Requests:
        """Requests of `rate` per second from 0 on, for so many seconds."""
        draw = np.random.default_rng(rng.getrandbits(64))
        scale = 1.0 / (rate * mean_of(self.gaps))
        num = int(seconds * rate * 1.2) + 256
        times: list[Array] = []
        last = 0.0
        while last < seconds:
            times.append(last + np.cumsum(np.interp(draw.random(num), SHARES, self.gaps) * scale))
            last = float(times[-1][-1])
        at = np.concatenate(times)
        at = at[at < seconds]
        place = draw.random(len(at))
        prompts = np.interp(place, SHARES, self.prompts)
        outputs = np.empty(len(at))
        band = np.minimum((place * len(self.outputs)).astype(int), len(self.outputs) - 1)
        shares = draw.random(len(at))
        for number, quantiles in enumerate(self.outputs):
            here = band == number
            outputs[here] = np.interp(shares[here], SHARES, quantiles)
        return Requests(at=at, prompts=_whole(prompts), outputs=_whole(outputs))

    @property
    def mean_outputs(self) -> float:
        """Of an answer, in tokens."""
        return sum(map(mean_of, self.outputs)) / len(self.outputs)


@dataclass(frozen=True, kw_only=True)
class Requests:
    """A load, by time: seconds, prompt tokens, answer tokens. Arrays of one length."""

    at: Array
    prompts: npt.NDArray[np.int64]
    outputs: npt.NDArray[np.int64]


def _whole(values: Array) -> npt.NDArray[np.int64]:
    return np.maximum(1, np.rint(values)).astype(np.int64)


def mean_of(quantiles: Sequence[float]) -> float:
    """The mean of what is drawn evenly between quantiles at SHARES."""
    return float(np.trapezoid(np.asarray(quantiles), np.asarray(SHARES)))


def load_figures(path: Path = FILE) -> dict[str, TraceFigures]:
    """The committed figures, by name."""
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: TraceFigures(
            name=name,
            source=entry["source"],
            requests=entry["requests"],
            span_s=entry["span_s"],
            prompts=tuple(entry["prompts"]),
            outputs=tuple(tuple(band) for band in entry["outputs"]),
            gaps=tuple(entry["gaps"]),
        )
        for name, entry in entries.items()
    }


def figures_of(name: str, source: str, trace: Sequence[Arrival]) -> TraceFigures:
    """The figures of a trace. Requests of one timestamp (some traces tick) are spread over the tick at random."""
    prompts = np.array([arrival.prompt_tokens for arrival in trace], dtype=np.float64)
    outputs = np.array([arrival.output_tokens for arrival in trace], dtype=np.float64)
    at = _spread(np.array([arrival.at_s for arrival in trace]))
    gaps = np.diff(at)
    order = np.argsort(prompts, kind="stable")
    bands = [outputs[part] for part in np.array_split(order, NUM_BANDS)]
    return TraceFigures(
        name=name,
        source=source,
        requests=len(trace),
        span_s=round(float(at[-1] - at[0]), 3),
        prompts=_quantiles(prompts, 1),
        outputs=tuple(_quantiles(band, 1) for band in bands),
        gaps=_quantiles(gaps / gaps.mean(), 5),
    )


def _quantiles(values: Array, digits: int) -> tuple[float, ...]:
    return tuple(round(float(value), digits) for value in np.quantile(values, SHARES))


def _spread(at: Array) -> Array:
    """Times that are equal (to 10 ms) are spread over the time to the next different one."""
    starts = np.flatnonzero(np.concatenate(([True], np.diff(at) > 0.01)))
    if len(starts) > len(at) / 2:
        return at
    ends = np.append(starts[1:], len(at))
    widths = np.append(np.diff(at[starts]), 1.0)
    spread, draw = at.copy(), np.random.default_rng(0)
    for start, end, width in zip(starts, ends, widths, strict=True):
        spread[start:end] = at[start] + width * np.sort(draw.random(end - start))
    return spread


def main() -> None:
    """Derive the committed figures from the two traces."""
    code, conversation = map(Path, sys.argv[1:3])
    sources = (
        ("code", "AzurePublicDataset, AzureLLMInferenceTrace_code.csv (CC-BY; Splitwise)", code),
        ("conversation", "kvcache-ai/Mooncake, conversation_trace.jsonl (Apache-2.0)", conversation),
    )
    entries = {}
    for name, source, path in sources:
        figures = figures_of(name, source, read_trace(path))
        entries[name] = {field: value for field, value in vars(figures).items() if field != "name"}
    FILE.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
