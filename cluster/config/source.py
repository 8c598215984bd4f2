"""Reads the cluster file, --set and the flags, and remembers where each value came from.

Later sources win: defaults, the file, flags, --set. Every error names the key, the place ("cluster.yaml:7", "--port")
and what was expected there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config.model import ClusterConfig

Key = tuple[str | int, ...]
_NAMED_SECTIONS = {"roles", "admin", "ray"}


class ConfigError(ValueError):
    """What a user set is wrong; the message has one line per error."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the command line brought: a file, flags by dotted key, and --set texts (KEY=VALUE)."""

    file: Path | None = None
    flags: Mapping[str, str | bool] = field(default_factory=dict)
    sets: Sequence[str] = ()


def load_config(sources: Sources) -> ClusterConfig:
    """The validated configuration. Raises ConfigError."""
    values: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    if sources.file is not None:
        values = _read_file(sources.file, origins)
    for dotted, value in sources.flags.items():
        _put(values, _parse_key(dotted), value, origins, f"--{flag_name(dotted).replace('_', '-')}")
    for text in sources.sets:
        dotted, equals, raw = text.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"--set {text}: expected KEY=VALUE, such as pools.0.workers=4")
        _put(values, _parse_key(dotted.strip()), _parse_value(raw, text), origins, f"--set {text}")
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, origins) for e in error.errors())) from error


def flag_name(dotted: str) -> str:
    """A flag's parameter: its key's last word, with the section's name where that alone would say too little."""
    section, _, name = dotted.rpartition(".")
    return f"{section}_{name}" if section in _NAMED_SECTIONS else name


def _read_file(path: Path, origins: dict[Key, str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        values = yaml.safe_load(text)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: expected keys and values, such as model: /path")
    assert tree is not None, "safe_load found values, so there is a tree"
    _note_lines(tree, (), path, origins)
    return values


def _note_lines(node: yaml.Node, key: Key, path: Path, origins: dict[Key, str]) -> None:
    """Fill in file:line of every key below `node`; a key that stands twice is an error."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            below = (*key, str(name.value))
            place = f"{path}:{name.start_mark.line + 1}"
            if below in origins and name.value != "<<":
                raise ConfigError(f"{place}: {_dotted(below)}: stands here again, first at {origins[below]}")
            origins[below] = place
            _note_lines(value, below, path, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*key, index)
            origins[below] = f"{path}:{value.start_mark.line + 1}"
            _note_lines(value, below, path, origins)


def _parse_key(dotted: str) -> Key:
    return tuple(int(part) if part.isdigit() else part.replace("-", "_") for part in dotted.split("."))


def _parse_value(raw: str, text: str) -> Any:
    """Lists, maps and null as YAML; everything else stays text, for the key's type to read."""
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from error
    return value if isinstance(value, dict | list) or value is None else raw


def _put(values: dict[str, Any], key: Key, value: Any, origins: dict[Key, str], origin: str) -> None:
    """values[key] = value, making what lies between. pools.N starts from the default pools and may append one."""
    if key[0] == "pools" and "pools" not in values and len(key) > 1:
        pools: Any = ClusterConfig.model_fields["pools"].default
        values["pools"] = [pool.model_dump(exclude_unset=True) for pool in pools]
    at: Any = values
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        fresh: Any = value if last else ([] if isinstance(key[depth + 1], int) else {})
        if isinstance(at, list):
            if not isinstance(part, int) or part > len(at):
                raise ConfigError(f"{origin}: {_dotted(key)}: expected an index of at most {len(at)}, got {part}")
            if part == len(at):
                at.append(fresh)
            elif last:
                at[part] = fresh
        elif isinstance(at, dict):
            if last or at.get(str(part)) is None:
                at[str(part)] = fresh
            part = str(part)
        else:
            raise ConfigError(f"{origin}: {_dotted(key)}: {_dotted(key[:depth])} has no keys below it")
        at = at[part]
    origins[key] = origin


def _dotted(key: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in key)


def _explain(error: Any, origins: dict[Key, str]) -> str:
    """One line: place, key, what was expected, what was found."""
    key: Key = tuple(error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    if error["type"] == "extra_forbidden":
        message = f"there is no such key; {_known_keys(key)}"
    elif error["type"] == "missing":
        message = "is missing"
    elif error["type"] == "value_error" and (own := re.match(r"([a-z_]+(?:\.[a-z_0-9]+)*): ", message)):
        key, message = _parse_key(own[1]), message[own.end() :]
    elif error["type"] != "value_error":
        message = f"{message}, got {error['input']!r}"
    above = [origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins]
    below = [origin for known, origin in origins.items() if known[: len(key)] == key]
    place = next(iter(above + below), "")
    return ": ".join(part for part in (place, _dotted(key), message) if part)


def _known_keys(key: Key) -> str:
    """The nearest known key beside a wrong one, or all of them."""
    model: Any = ClusterConfig
    for part in key[:-1]:
        if isinstance(part, str):
            model = next(iter(_models_in(model.model_fields[part].annotation)))
    names = sorted(model.model_fields)
    near = difflib.get_close_matches(str(key[-1]), names, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
