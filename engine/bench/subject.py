"""What can be measured: an engine that runs the loads of workload.py. One a process, so that its memory is its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from engine.bench import workload
from engine.bench.workload import MixedRequest


class SubjectSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine runs which checkpoint, and how. `options`: further fields of EngineConfig (neap only)."""

    engine: str
    model: str
    dtype: str
    threads: int
    kv_cache_bytes: int
    options: dict[str, bool | int | float | str] = {}

    @property
    def model_dir(self) -> Path:
        """The checkpoint's folder."""
        return Path(self.model)


class Subject(Protocol):
    """An engine, loaded and warm. Greedy; nothing ends before its length. Times in seconds."""

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that compute."""
        ...

    def prefill_s(self, prompt: Sequence[int]) -> float:
        """From a prompt never seen before to its first token."""
        ...

    def prepare_decode(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the prompts' KV where it can be kept, and run a few decode steps of this batch."""
        ...

    def decode_rate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> float:
        """Tokens/s of the whole batch while every request decodes."""
        ...

    def mixed_rate(self, requests: Sequence[MixedRequest]) -> float:
        """Output tokens per second of wall time, all requests at once."""
        ...


def prepare(subject: Subject, measure: str) -> None:
    """What comes once before the runs of a measure (names: workload.MEASURES)."""
    kind, size = _parse(measure)
    if kind == "prefill":
        subject.prefill_s(workload.prompt(size, workload.WARM_SEED, subject.vocab_size))
    elif kind == "decode":
        subject.prepare_decode(workload.decode_prompts(size, subject.vocab_size))


def run(subject: Subject, measure: str, repetition: int) -> float:
    """One run of a measure: tokens/s."""
    kind, size = _parse(measure)
    if kind == "prefill":
        return size / subject.prefill_s(workload.prompt(size, workload.MEASURED_SEED + repetition, subject.vocab_size))
    if kind == "decode":
        return subject.decode_rate(workload.decode_prompts(size, subject.vocab_size), workload.NEW_TOKENS)
    return subject.mixed_rate(workload.mixed_requests(subject.vocab_size, repetition))


def _parse(measure: str) -> tuple[str, int]:
    assert measure in workload.MEASURES, f"the command checks names, got {measure}"
    kind, _, size = measure.partition("_")
    return kind, int(size.lstrip("b") or 0)
