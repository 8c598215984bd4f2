"""Flags of FastDeploy's and vLLM's commands on `neap serve`, generated from the tables of foreign_options: all parse,
none shows up in --help, and each does what its row says. Our own flags of the same name stand in flags.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from cluster.config.foreign_options import BACKENDS, FOREIGN_OPTIONS
from engine.foreign_options import ForeignOption, Settled, our_value, settle

PREFIX = "foreign_"  # of parameter names, which no flag of ours begins with


def foreign_parameters(own: Iterable[str]) -> dict[str, tuple[ForeignOption, inspect.Parameter]]:
    """Row and typer parameter of every foreign flag, by parameter name; without those that are `own` flags by now."""
    taken = frozenset(own)
    return {
        PREFIX + option.name: (option, _parameter(option)) for option in FOREIGN_OPTIONS if option.name not in taken
    }


def _parameter(option: ForeignOption) -> inspect.Parameter:
    flag = option.name.replace("_", "-")
    names = (f"--{flag}/--no-{flag}",) if option.is_switch else (f"--{flag}", *option.aliases)
    kind: Any = bool | None if option.is_switch else str | None
    annotation = Annotated[kind, typer.Option(*names, hidden=True)]
    return inspect.Parameter(PREFIX + option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def settle_flags(
    rows: Mapping[str, tuple[ForeignOption, inspect.Parameter]],
    values: Mapping[str, str | bool | None],
    keys: Mapping[str, str],
) -> Settled:
    """What becomes of the foreign flags that were given. `keys`: dotted key of each of our flags, by its name."""
    given = ((rows[name][0], value) for name, value in values.items() if value is not None)
    settled = settle(given, prefix="--")
    settled.ours = {keys.get(name, name): value for name, value in settled.ours.items()}
    return settled


def our_flag_value(key: str, value: str | bool) -> str | bool:
    """A value of a flag of ours as other servers write it."""
    if key == "backend" and isinstance(value, str):
        return BACKENDS.get(value, value)
    read: str | bool = our_value(key.split(".")[-1], value)
    return read
