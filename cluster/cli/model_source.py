"""Where the model comes from: a folder, a Hugging Face id, or the model that the package carries.

A download runs in a process of its own, so that a ctrl-C ends it at once.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from cluster.config import ClusterConfig
from cluster.config.environment import child_environment
from engine.models.hub import News, is_hub_id, lines_of_progress, model_folder
from engine.tiny.embedded import EMBEDDED_CHECKPOINT


def checked_model(config: ClusterConfig) -> ClusterConfig:
    """The configuration, a Hugging Face model served under its id. Raises ValueError if a folder is no checkpoint."""
    if not is_hub_id(config.model):
        if config.model:
            model_folder(config.model, revision=config.revision)
        return config
    return config.model_copy(update={"served_model_name": config.served_model_name or config.model})


async def find_model(config: ClusterConfig, tell: Callable[[str], None]) -> str:
    """The checkpoint's folder, downloaded if need be. `tell` gets a line now and then. Raises ValueError."""
    if is_hub_id(config.model):
        return await _fetched(config.model, config.revision, tell)
    if config.model:
        return str(model_folder(config.model, revision=config.revision))
    return str(EMBEDDED_CHECKPOINT)


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
