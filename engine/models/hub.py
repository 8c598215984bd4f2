"""Models by their Hugging Face id: the files that serving needs, from the hub's cache or downloaded into it.

The huggingface_hub library reads its own environment: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN. What is in the
cache is used where the hub can't be reached. `python -m engine.models.hub ID [REVISION]` does it in a process of its
own and prints News, one JSON value a line. Torch-free.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

Progress = Callable[[int, int], None]

# Everything a checkpoint of ours may hold; other formats of the same weights are left on the hub.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_NEWS_EVERY_S = 0.5
_LINE_EVERY_S = 5.0


class News(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a download is, in bytes; at its end `path` or `error`."""

    done: int = 0
    total: int = 0
    path: str = ""
    error: str = ""


def is_hub_id(model: str) -> bool:
    """Whether it can only mean a model of the hub: ORGANISATION/NAME, and no such folder here."""
    return _ID.fullmatch(model) is not None and not Path(model).exists()


def lines_of_progress(model: str, tell: Callable[[str], None]) -> Progress:
    """A Progress that tells a line for people every few seconds, and one at the end."""
    told_s = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told_s
        if total and (time.monotonic() - told_s >= _LINE_EVERY_S or done == total):
            told_s = time.monotonic()
            tell(f"downloading {model}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    return progress


def model_folder(
    model: str,
    *,
    revision: str = "",
    progress: Progress | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The checkpoint's folder: `model` itself if it is one, else the hub's snapshot of `revision` (default: main).

    `progress(done, total)` in bytes, now and then, from other threads. `endpoint` and `cache_dir` go before the
    environment's. Raises ValueError, in words for people, when there is no such model or it can't be had.
    """
    folder = Path(model).expanduser().resolve()
    if is_hub_id(model):
        folder = _download(model, revision, progress, endpoint, cache_dir)
        if not (folder / "config.json").is_file():
            raise ValueError(f"model: {model} has no config.json on the hub: nothing that can be served")
    elif not (folder / "config.json").is_file():
        what = "is no checkpoint folder (it has no config.json)" if folder.is_dir() else "does not exist"
        raise ValueError(f"model: {folder} {what}; models of the hub are named ORGANISATION/NAME")
    elif revision:
        raise ValueError(f"revision {revision!r} means nothing for a folder: {folder}")
    return folder


def _download(
    model: str, revision: str, progress: Progress | None, endpoint: str | None, cache_dir: Path | None
) -> Path:
    # not at the top: it takes half a second, which models that lie here need not pay
    import httpx2
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    where = endpoint or constants.ENDPOINT
    try:
        path = snapshot_download(
            model,
            revision=revision or None,
            endpoint=endpoint,
            cache_dir=cache_dir,
            allow_patterns=list(_FILES),
            tqdm_class=_counter(progress),
        )
    except (OSError, HFValidationError, httpx2.HTTPError) as error:
        raise ValueError(
            f"model: {_reason(model, revision, where, str(cache_dir or constants.HF_HUB_CACHE), error)}"
        ) from error
    return Path(path)


def _reason(model: str, revision: str, where: str, cache: str, error: Exception) -> str:
    """What to do about it, in one line. Order matters: the library's errors are subclasses of one another."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        return f"{model} is gated: accept its terms at {where}/{model}, then set HF_TOKEN ({status})"
    if isinstance(error, RevisionNotFoundError):
        return f"{model} has no revision {revision!r} at {where}"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            f"no folder {model} here, and {where} has no such model that you may read ({status}): check the name; "
            "for a private one set HF_TOKEN"
        )
    if status:
        return f"{where} answered {status} for {model}: {_first_line(error)}"
    if isinstance(error, LocalEntryNotFoundError):
        place = f"{model}{f' at {revision}' if revision else ''} is not, or not wholly, in {cache}"
        if constants.HF_HUB_OFFLINE:
            return f"{place}, and HF_HUB_OFFLINE forbids the network"
        return f"{where} can't be reached ({_first_line(error.__cause__ or error)}), and {place}"
    return f"{model} could not be downloaded from {where}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _counter(progress: Progress | None) -> type[Any]:
    """A tqdm that draws nothing and reports the bytes on disk."""
    from tqdm.auto import tqdm

    class Counter(tqdm):  # type: ignore[misc]  # untyped
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._told_s = 0.0
            self._done = 0
            super().__init__(*args, **{**kwargs, "disable": True})
            # a disabled one keeps nothing
            self.total = kwargs.get("total")
            self._counts = kwargs.get("unit") == "B" and str(kwargs.get("desc")).startswith("Reconstructing")

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            now_s = time.monotonic()
            if progress is not None and self._counts and now_s - self._told_s >= _NEWS_EVERY_S:
                self._told_s = now_s
                progress(self._done, max(int(self.total or 0), self._done))
            return None

        def set_description(self, *args: Any, **kwargs: Any) -> None:
            """The library says this at the end."""
            if progress is not None and self._counts:
                progress(self._done, max(int(self.total or 0), self._done))

    return Counter


def main(arguments: list[str]) -> int:
    """Returns the exit code."""

    def tell(news: News) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(news) + b"\n")
        sys.stdout.buffer.flush()

    model, revision = [*arguments, ""][:2]
    try:
        path = model_folder(model, revision=revision, progress=lambda done, total: tell(News(done=done, total=total)))
    except ValueError as error:
        tell(News(error=str(error)))
        return 1
    tell(News(path=str(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
