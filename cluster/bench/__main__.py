"""`make bench`: drives a router with random prompts at a fixed concurrency and prints the figures as JSON.

python -m cluster.bench                               a cluster of its own, with the default model
python -m cluster.bench -- --set fake.vocab_size=320  the same with the exact fake: measures everything but the model
python -m cluster.bench --url http://127.0.0.1:8180   a running one
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import uvloop

from cluster.bench.client import Outcome, stream_completion
from cluster.bench.report import summarise

FIRST_TOKEN_ID, LAST_TOKEN_ID = 16, 255  # plain tokens in every vocabulary that is served here


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 if a request failed."""
    options = _parser().parse_args(arguments)
    if options.url:
        figures = measure(options.url, options)
    else:
        with own_cluster(options.serve) as url:
            figures = measure(url, options)
    print(json.dumps(figures, indent=2))
    return 1 if figures["errors"] else 0


def measure(url: str, options: argparse.Namespace) -> dict[str, object]:
    """Warm up with one request, then run all of them."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {options.api_key}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        model = json.load(response)["data"][0]["id"]
    outcomes, seconds = uvloop.run(_run_all(host, port, model, options))
    shape = {
        "concurrency": options.concurrency,
        "prompt_tokens": options.prompt_tokens,
        "max_tokens": options.max_tokens,
    }
    return {"model": model, **shape, **summarise(outcomes, seconds)}


async def _run_all(host: str, port: int, model: str, options: argparse.Namespace) -> tuple[list[Outcome], float]:
    draw = random.Random(options.seed)

    def body() -> dict[str, object]:
        prompt = [draw.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(options.prompt_tokens)]
        return {"model": model, "prompt": prompt, "max_tokens": options.max_tokens, "ignore_eos": True}

    await stream_completion(host, port, body(), api_key=options.api_key)
    bodies = [body() for _ in range(options.requests)]
    outcomes: list[Outcome] = []

    async def work() -> None:
        while bodies:
            outcomes.append(await stream_completion(host, port, bodies.pop(), api_key=options.api_key))

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(options.concurrency)))
    return outcomes, time.perf_counter() - started


@contextmanager
def own_cluster(arguments: list[str]) -> Iterator[str]:
    """`neap serve` as plain processes on a free port while the context lasts: its URL. Raises RuntimeError."""
    command = [sys.executable, "-m", "neap", "serve", "--backend", "process", "--port", "0", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "stdout is a pipe"
        try:
            url = ""
            for line in process.stdout:
                if match := re.search(r"endpoint\s+(http://\S+)/v1", line):
                    url = match[1]
                if line.startswith("curl "):
                    break
            if not url:
                raise RuntimeError(f"neap serve ended: {process.wait()}")
            yield url
        finally:
            process.terminate()
            process.communicate()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="", help="a running router; default: start a cluster")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("serve", nargs="*", help="options for neap serve, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
