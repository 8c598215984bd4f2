"""What generation_config.json says about sampling where the caller says nothing."""

from __future__ import annotations

import json
from pathlib import Path

from engine.request import SamplingParams

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_defaults(folder: Path) -> SamplingParams:
    """SamplingParams with the checkpoint's values; those of SamplingParams itself without the file.

    Raises ValueError naming the file and the field.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return SamplingParams()
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("must hold an object")
        return SamplingParams(**{name: content[name] for name in _NAMES if content.get(name) is not None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
