"""A measured engine's process: `python -m engine.bench.child`; over its stdin and stdout go JSON values, one a line.

in: a SubjectSpec, then Commands; out: Ready, then a Measured per command, or Failed at any time, which is the last.
It ends when its stdin or its parent does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import BinaryIO

import msgspec

from engine.bench.subject import Subject, SubjectSpec, prepare, run

_PR_SET_PDEATHSIG = 1


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Run a measure once; with `repetition` -1 only what comes before its runs."""

    measure: str
    repetition: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Loaded and warm."""

    versions: dict[str, str]


class Measured(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Tokens/s; 0 after what comes before the runs."""

    rate: float


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Why it goes no further, in words for people."""

    reason: str


Answer = Ready | Measured | Failed


def serve(lines: BinaryIO, answers: BinaryIO) -> int:
    """Answer commands until their end. Returns the exit code."""

    def answer(value: Answer) -> None:
        answers.write(msgspec.json.encode(value) + b"\n")
        answers.flush()

    try:
        subject = load(msgspec.json.decode(lines.readline(), type=SubjectSpec))
        answer(Ready(versions=subject.versions))
        for line in lines:
            command = msgspec.json.decode(line, type=Command)
            if command.repetition < 0:
                prepare(subject, command.measure)
                answer(Measured(rate=0.0))
            else:
                answer(Measured(rate=run(subject, command.measure, command.repetition)))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        answer(Failed(reason=f"{error}" or type(error).__name__))
        return 1
    return 0


def load(spec: SubjectSpec) -> Subject:
    """The engine that the spec names. Raises ValueError."""
    if spec.engine == "transformers":
        # not at the top: it need not be installed, and takes seconds and memory that ours must not be charged with
        from engine.bench.transformers_subject import TransformersSubject

        return TransformersSubject(spec)
    from engine.bench.neap_subject import NeapSubject

    return NeapSubject(spec)


def main() -> int:
    """Keep stdout for answers: whatever libraries print goes to stderr."""
    # a bench that is killed in the middle of a measure leaves nothing behind that goes on computing
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    sys.exit(main())
