"""Starts one child per engine and runs the measures, the engines taking turns so that noise meets both."""

from __future__ import annotations

import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import msgspec

from engine.bench.child import Answer, Command, Failed, Measured, Ready
from engine.bench.memory import peak_rss_mib
from engine.bench.subject import SubjectSpec

_START_DEADLINE_S = 1800.0
_MEASURE_DEADLINE_S = 3600.0
_END_DEADLINE_S = 10.0


class BenchError(RuntimeError):
    """An engine could not be measured; the message says which and why."""


class EngineFigures(msgspec.Struct, kw_only=True):
    """What one engine did. Rates in tokens/s by measure, one per run; times in seconds.

    `start_s`: from starting the process to a loaded and warm engine. `peak_rss_mib`: so far.
    """

    engine: str
    versions: dict[str, str]
    start_s: float
    peak_rss_mib: float
    runs: dict[str, list[float]]

    def median(self, measure: str) -> float:
        """Of its runs."""
        return statistics.median(self.runs[measure])

    def spread(self, measure: str) -> float:
        """Half the range of the runs over their median."""
        runs = self.runs[measure]
        return (max(runs) - min(runs)) / 2 / statistics.median(runs)


class Child:
    """One engine in a process of its own."""

    def __init__(self, spec: SubjectSpec, process: subprocess.Popen[bytes]) -> None:
        self.engine = spec.engine
        self.pid = process.pid
        self._process = process
        self._buffer = b""
        self.send(spec)

    def send(self, message: SubjectSpec | Command) -> None:
        """Raises BenchError if the process has ended."""
        assert self._process.stdin is not None, "stdin is a pipe"
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise BenchError(f"{self.engine}: its process ended with {self._process.wait(_END_DEADLINE_S)}") from error

    def ready(self) -> Ready:
        """Wait until it is loaded and warm. Raises BenchError."""
        answer = self._answer(_START_DEADLINE_S)
        assert isinstance(answer, Ready), "a child says first that it is ready"
        return answer

    def measure(self, measure: str, repetition: int) -> float:
        """Tokens/s of one run. Raises BenchError."""
        self.send(Command(measure=measure, repetition=repetition))
        answer = self._answer(_MEASURE_DEADLINE_S)
        assert isinstance(answer, Measured), "a ready child answers with figures"
        return answer.rate

    def _answer(self, deadline_s: float) -> Ready | Measured:
        answer: Ready | Measured | Failed = msgspec.json.decode(self._line(deadline_s), type=Answer)
        if isinstance(answer, Failed):
            raise BenchError(f"{self.engine}: {answer.reason}")
        return answer

    def _line(self, deadline_s: float) -> bytes:
        assert self._process.stdout is not None, "stdout is a pipe"
        end_s = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(end_s - time.monotonic(), 0)):
                    raise BenchError(f"{self.engine}: no answer in {deadline_s:.0f} s")
                data = self._process.stdout.read1(65536)  # type: ignore[attr-defined]  # a BufferedReader
                if not data:
                    code = self._process.wait(_END_DEADLINE_S)
                    raise BenchError(f"{self.engine}: its process ended with {code} (what it wrote stands above)")
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


@contextmanager
def started(spec: SubjectSpec, environment: Mapping[str, str]) -> Iterator[Child]:
    """A child for as long as the context lasts; it is ended at the end, however that comes."""
    command = [sys.executable, "-m", "engine.bench.child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environment)) as process:
        try:
            yield Child(spec, process)
        finally:
            process.kill()
            process.communicate()


def run_session(
    specs: Sequence[SubjectSpec],
    measures: Mapping[str, Sequence[str]],
    *,
    repetitions: int,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
    save: Callable[[list[EngineFigures]], None],
) -> list[EngineFigures]:
    """Measure every spec's engine. `measures`: by engine, in the order of workload.MEASURES. Raises BenchError.

    Engines start one after another and stay: each measure's runs alternate between them. `save` gets the figures so far
    after every measure, so that a run that is cut short has not been for nothing.
    """
    with ExitStack() as stack:
        children: list[Child] = []
        figures: list[EngineFigures] = []
        for spec in specs:
            tell(f"{spec.engine}: starting")
            start_s = time.perf_counter()
            child = stack.enter_context(started(spec, environment))
            ready = child.ready()
            start_s = time.perf_counter() - start_s
            tell(f"{spec.engine}: ready in {start_s:.1f} s")
            children.append(child)
            figures.append(
                EngineFigures(engine=spec.engine, versions=ready.versions, start_s=start_s, peak_rss_mib=0, runs={})
            )
        for measure in dict.fromkeys(name for names in measures.values() for name in names):
            both = [pair for pair in zip(children, figures, strict=True) if measure in measures[pair[0].engine]]
            _take_turns(both, measure, repetitions, tell)
            for child, figure in zip(children, figures, strict=True):
                figure.peak_rss_mib = peak_rss_mib(child.pid)
            save(figures)
        return figures


def _take_turns(
    pairs: Sequence[tuple[Child, EngineFigures]], measure: str, repetitions: int, tell: Callable[[str], None]
) -> None:
    for child, _ in pairs:
        child.measure(measure, -1)
    for repetition in range(repetitions):
        for child, figure in pairs:
            rate = child.measure(measure, repetition)
            figure.runs.setdefault(measure, []).append(rate)
            tell(f"{child.engine}: {measure} run {repetition + 1}/{repetitions}: {rate:.1f} tok/s")
