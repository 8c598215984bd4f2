"""The public face: `from neap import LLM, SamplingParams`, and `python -m neap` for the command line.

Importing this module imports nothing heavy; each name is loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.llm import LLM, CompletionOutput, RequestOutput
    from engine.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "engine.llm",
    "CompletionOutput": "engine.llm",
    "RequestOutput": "engine.llm",
    "SamplingParams": "engine.request",
}
_OUR_PACKAGES = ("engine", "cluster")


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'neap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def main() -> None:
    """The `neap` command. Ctrl-C at any moment, while it imports too, ends it without a traceback."""
    try:
        import_module("cluster.cli").main()
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse_foreign_packages() -> None:
    """`engine` and `cluster` are common names: raises ImportError when another package of that name would be used."""
    here = Path(__file__).resolve().parent
    for name in _OUR_PACKAGES:
        expected = here / name / "__init__.py"
        loaded = sys.modules.get(name)
        spec = find_spec(name) if loaded is None else None
        found = getattr(loaded, "__file__", None) if loaded is not None else spec.origin if spec is not None else None
        if found is None or Path(found).resolve() != expected:
            place = f"that is {found}" if found else "there is none, or one without an __init__.py"
            raise ImportError(
                f"neap needs its own package {name!r} at {expected.parent}, but {place}. Another distribution or a "
                f"folder on the Python path has the same name: use a virtual environment of neap's own."
            )


_refuse_foreign_packages()

if __name__ == "__main__":
    main()
