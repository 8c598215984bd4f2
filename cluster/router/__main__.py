"""`python -m cluster.router SPEC.json`: runs one router. Log goes to stderr, news as JSON lines to stdout."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import msgspec

from cluster.router.server import run_router
from cluster.spec import RouterSpec
from cluster.worker.lifeline import die_with_parent, is_pipe


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s router %(levelname)s %(name)s: %(message)s")
    if len(arguments) != 1:
        return _failed("usage: python -m cluster.router SPEC.json")
    if is_pipe(sys.stdin.fileno()):  # whoever started us watches over us; a person at a terminal does not
        die_with_parent()
    try:
        spec = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=RouterSpec)
        run_router(spec, _listening)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        return _failed(str(error))
    return 0


def _listening(host: str, port: int) -> None:
    _say({"listening": f"[{host}]:{port}" if ":" in host else f"{host}:{port}"})


def _failed(why: str) -> int:
    logging.getLogger("neap.router").error("%s", why)
    _say({"failed": why})
    return 1


def _say(news: dict[str, str]) -> None:
    print(json.dumps(news), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
