"""Command-line flags from the cluster file's model: one per plain option of the file and of its sections.

A flag has its key's last word (--max-model-len is engine.max_model_len); roles', admin's and ray's carry the section's
name too (--roles-ttft-ms). Pools, the fake and the planner's tuning have none: --set pools.0.workers=4. Values stay
text here; the model reads them, so that all errors are its.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import ClusterConfig
from cluster.config.model import AdminConfig, EngineSection, RayConfig, RolesConfig, RouterConfig
from cluster.config.source import flag_name

_ARGUMENTS = {"model"}  # given without a flag
_ROLES_FLAGS = {"auto", "ttft_ms", "tpot_ms"}  # the rest is for few, who have a file, or --set roles.hysteresis=0.1
_SECTIONS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("", ClusterConfig, "Cluster"),
    ("engine", EngineSection, "Engine (every pool; pools.N.KEY overrides)"),
    ("router", RouterConfig, "Router"),
    ("roles", RolesConfig, "Roles"),
    ("admin", AdminConfig, "Admin API"),
    ("ray", RayConfig, "Ray"),
)


def flag_parameters() -> dict[str, tuple[str, inspect.Parameter]]:
    """Dotted key and typer parameter of every flag, by parameter name."""
    flags: dict[str, tuple[str, inspect.Parameter]] = {}
    for section, model, panel in _SECTIONS:
        for name, field in model.model_fields.items():
            if name in _ARGUMENTS or not _is_plain(field) or (section == "roles" and name not in _ROLES_FLAGS):
                continue
            parameter = flag_name(f"{section}.{name}")
            assert parameter not in flags, f"two options would be --{parameter}"
            flags[parameter] = (f"{section}.{name}".lstrip("."), _parameter(parameter, field, panel))
    return flags


def _is_plain(field: FieldInfo) -> bool:
    """True for values that fit behind a flag: no sections, no lists of them."""
    return field.default is not None and isinstance(field.default, str | bool | int | float)


def _parameter(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    option: Any = typer.Option(
        f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag,
        help=field.description,
        metavar=None if field.annotation is bool else "VALUE",
        show_default=str(field.default) if field.default != "" else False,
        rich_help_panel=panel,
    )
    kind: Any = bool | None if field.annotation is bool else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
