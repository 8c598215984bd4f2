"""`python -m cluster.worker SPEC.json`: runs a worker's network process, which runs its rank. Log on stderr."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec
import uvloop

from cluster.spec import WorkerSpec
from cluster.worker.lifeline import die_with_parent, is_pipe
from cluster.worker.process import WorkerProcess, say

_log = logging.getLogger("neap.worker")


async def _run(spec: WorkerSpec) -> int:
    return await WorkerProcess(spec, say).run()


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(name)s: %(message)s")
    if len(arguments) != 1:
        return _failed("usage: python -m cluster.worker SPEC.json")
    if is_pipe(sys.stdin.fileno()):  # whoever started us watches over us; a person at a terminal does not
        die_with_parent()
    try:
        spec = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=WorkerSpec)
        return uvloop.run(_run(spec))
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        return _failed(str(error))


def _failed(why: str) -> int:
    _log.error("%s", why)
    say({"failed": why})
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
