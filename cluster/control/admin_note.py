"""The note by which `neap switch` finds the admin API of a cluster on this machine: URL and token, for its user only.

It lies in the state folder with mode 0600 and is gone when the cluster ends; what a killed one has left behind is taken
away by whoever looks next.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.config.environment import state_dir


@dataclass(frozen=True, kw_only=True)
class AdminNote:
    """How to reach the admin API of one cluster; `routers` are its routers' URLs, `pid` is the controller's."""

    url: str
    token: str
    routers: tuple[str, ...]
    pid: int

    def write(self, run_dir: Path) -> Path | None:
        """Write it, whole or not at all, never readable for others; into run_dir if there is no state folder to be had.

        Returns where; None if it can be written nowhere.
        """
        for folder in (state_dir(), run_dir):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                path = folder / f"admin-{self.pid}.json"
                fresh = path.with_suffix(f".{secrets.token_hex(4)}")
                with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                    json.dump(asdict(self), file)
                return fresh.replace(path)
            except OSError:
                continue
        return None


def notes() -> tuple[AdminNote, ...]:
    """The clusters of this user that run on this machine."""
    found = []
    for path in sorted(state_dir().glob("admin-*.json")):
        try:
            note = _parse(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # just gone, or not ours
        if psutil.pid_exists(note.pid):
            found.append(note)
        else:
            path.unlink(missing_ok=True)
    return tuple(found)


def _parse(value: Any) -> AdminNote:
    return AdminNote(
        url=str(value["url"]),
        token=str(value["token"]),
        routers=tuple(str(url) for url in value["routers"]),
        pid=int(value["pid"]),
    )
