"""What an open-loop load consists of: when each request comes, how long its prompt is, how many tokens it asks for.

Synthetic (Poisson arrivals, log-normal lengths) or from a recorded trace, scaled in rate and length. The same seed and
options give the same load. Prompts are token ids; those of a trace share prefixes as its `hash_ids` say.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

FIRST_TOKEN_ID, LAST_TOKEN_ID = 16, 255  # plain tokens in every vocabulary that is served here
TRACE_BLOCK = 512  # prompt tokens per entry of a trace's hash_ids


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request. `at_s` counts from the load's start; `blocks` name the prompt's pieces of `block_tokens` each."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = TRACE_BLOCK

    def token_ids(self, seed: int, index: int) -> list[int]:
        """The prompt: equal blocks are equal tokens, the rest is this request's own."""
        ids: list[int] = []
        for block in self.blocks[: self.prompt_tokens // self.block_tokens]:
            ids += _draw(f"{seed}/block/{block}", self.block_tokens)
        return ids + _draw(f"{seed}/own/{index}", self.prompt_tokens - len(ids))


def _draw(key: str, num_tokens: int) -> list[int]:
    return random.Random(key).choices(range(FIRST_TOKEN_ID, LAST_TOKEN_ID + 1), k=num_tokens)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The load. `rate` is requests per second; 0 takes a trace's own. Lengths are means (synthetic) or factors."""

    num_requests: int = 100
    rate: float = 2.0
    prompt_tokens: int = 256
    output_tokens: int = 64
    spread: float = 0.5  # of the log-normal lengths; 0: all alike
    seed: int = 0
    trace: str = ""
    length_scale: float = 1.0
    max_tokens: int = 2048  # prompt and answer together are cut to this


def make_load(options: LoadOptions) -> list[Arrival]:
    """The arrivals, by time. Raises ValueError for a trace that is not understood."""
    if options.trace:
        return scaled(read_trace(Path(options.trace)), options)
    draw = random.Random(options.seed)
    arrivals: list[Arrival] = []
    at_s = 0.0
    for _ in range(options.num_requests):
        prompt = _length(draw, options.prompt_tokens, options.spread)
        output = _length(draw, options.output_tokens, options.spread)
        arrivals.append(_cut(Arrival(at_s=at_s, prompt_tokens=prompt, output_tokens=output), options.max_tokens))
        at_s += draw.expovariate(options.rate)
    return arrivals


def _length(draw: random.Random, mean: int, spread: float) -> int:
    return max(1, round(mean * draw.lognormvariate(-spread * spread / 2, spread)))


def _cut(arrival: Arrival, max_tokens: int) -> Arrival:
    output = min(arrival.output_tokens, max(1, max_tokens // 2))
    prompt = min(arrival.prompt_tokens, max_tokens - output)
    return Arrival(
        at_s=arrival.at_s,
        prompt_tokens=max(prompt, 1),
        output_tokens=output,
        blocks=arrival.blocks,
        block_tokens=arrival.block_tokens,
    )


def read_trace(path: Path) -> list[Arrival]:
    """A trace of either kind: JSON lines (timestamp ms, input_length, output_length, hash_ids) or CSV (TIMESTAMP,
    ContextTokens, GeneratedTokens). Raises ValueError naming the file."""
    try:
        with path.open(encoding="utf-8") as lines:
            return _read_jsonl(lines) if path.suffix == ".jsonl" else _read_csv(lines)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no trace that is known: {error}") from error


def _read_jsonl(lines: Iterable[str]) -> list[Arrival]:
    arrivals = []
    for line in lines:
        entry = json.loads(line)
        arrivals.append(
            Arrival(
                at_s=entry["timestamp"] / 1000,
                prompt_tokens=max(1, entry["input_length"]),
                output_tokens=max(1, entry["output_length"]),
                blocks=tuple(entry.get("hash_ids", ())),
            )
        )
    return arrivals


def _read_csv(lines: Iterable[str]) -> list[Arrival]:
    arrivals = []
    first: datetime | None = None
    for row in csv.DictReader(lines):
        at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
        first = first or at
        arrivals.append(
            Arrival(
                at_s=(at - first).total_seconds(),
                prompt_tokens=max(1, int(row["ContextTokens"])),
                output_tokens=max(1, int(row["GeneratedTokens"])),
            )
        )
    return arrivals


def scaled(trace: Sequence[Arrival], options: LoadOptions) -> list[Arrival]:
    """The trace's first requests with lengths times `length_scale`, at `rate` requests per second on average."""
    chosen = trace[: options.num_requests]
    if not chosen:
        raise ValueError(f"{options.trace}: the trace is empty")
    span_s = chosen[-1].at_s - chosen[0].at_s
    stretch = (len(chosen) - 1) / options.rate / span_s if options.rate and span_s else 1.0
    return [
        _cut(
            Arrival(
                at_s=(arrival.at_s - chosen[0].at_s) * stretch,
                prompt_tokens=max(1, round(arrival.prompt_tokens * options.length_scale)),
                output_tokens=max(1, round(arrival.output_tokens * options.length_scale)),
                blocks=arrival.blocks,
                block_tokens=max(1, round(TRACE_BLOCK * options.length_scale)),
            ),
            options.max_tokens,
        )
        for arrival in chosen
    ]
