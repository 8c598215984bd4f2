"""Where the model comes from: a folder, a Hugging Face id, or a small random checkpoint that is made.

What takes long (a download, torch to make a checkpoint) runs in a process of its own, so that a ctrl-C ends it at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

import engine
from cluster.config import ClusterConfig
from cluster.config.environment import cache_dir, child_environment
from engine.models.hub import News, is_hub_id, lines_of_progress, model_folder

_MAKE_DEFAULT = (
    "import sys, pathlib; from engine.tiny.random_checkpoint import default_checkpoint; "
    "print(default_checkpoint(pathlib.Path(sys.argv[1])))"
)


def checked_model(config: ClusterConfig) -> ClusterConfig:
    """The configuration, a Hugging Face model served under its id. Raises ValueError if a folder is no checkpoint."""
    if not is_hub_id(config.model):
        if config.model:
            model_folder(config.model, revision=config.revision)
        return config
    return config.model_copy(update={"served_model_name": config.served_model_name or config.model})


async def find_model(config: ClusterConfig, tell: Callable[[str], None]) -> str:
    """The checkpoint's folder, downloaded or made if need be. `tell` gets a line now and then. Raises ValueError."""
    if is_hub_id(config.model):
        return await _fetched(config.model, config.revision, tell)
    if config.model:
        return str(model_folder(config.model, revision=config.revision))
    return await _default()


async def _fetched(model: str, revision: str, tell: Callable[[str], None]) -> str:
    last, progress = News(error="model: the download ended without a word"), lines_of_progress(model, tell)
    async with _child("-m", "engine.models.hub", model, revision, stderr=None) as process:
        assert process.stdout is not None, "stdout is a pipe"
        async for line in process.stdout:
            last = msgspec.json.decode(line, type=News)
            progress(last.done, last.total)
    if not last.path:
        raise ValueError(last.error or "model: the download ended early")
    return last.path


async def _default() -> str:
    """Kept in a folder named by the code that made it, so the next start need not ask that code."""
    folder = cache_dir() / f"default-{_code_digest()}"
    made = [path.parent for path in folder.glob("[!.]*/config.json")]  # a half-made one has a dot
    if made:
        return str(made[0])
    async with _child("-c", _MAKE_DEFAULT, str(folder)) as process:
        out, err = await process.communicate()
    if process.returncode:
        raise ValueError(f"the small random model could not be made: {err.decode(errors='replace').strip()}")
    return out.decode().strip()


@asynccontextmanager
async def _child(*arguments: str, stderr: int | None = PIPE) -> AsyncIterator[Process]:
    """A Python process that ends with the context. `stderr` None: what it says there is shown."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=PIPE, stderr=stderr, env=child_environment()
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _code_digest() -> str:
    """Of what decides the default checkpoint's bytes."""
    digest = hashlib.sha256()
    for path in sorted((Path(engine.__path__[0]) / "tiny").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
