"""The only place that reads or sets environment variables."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def api_key() -> str:
    """NEAP_API_KEY, so that the key need not stand in a file or in a process list. Empty if not set."""
    return os.environ.get("NEAP_API_KEY", "")


def admin_token() -> str:
    """NEAP_ADMIN_TOKEN: what the admin API wants to see. Empty if not set."""
    return os.environ.get("NEAP_ADMIN_TOKEN", "")


def state_dir() -> Path:
    """Where running clusters note how to reach their admin API: NEAP_STATE, or the user's state folder."""
    if own := os.environ.get("NEAP_STATE", ""):
        return Path(own).expanduser()
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "state") / "neap"


def cache_dir() -> Path:
    """Where checkpoints that neap makes itself are kept: NEAP_CACHE, or the user's cache folder."""
    if own := os.environ.get("NEAP_CACHE", ""):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "neap"


def kernels() -> str:
    """NEAP_KERNELS: what engine.kernels is where nobody says. "torch" leaves our own CPU kernels out."""
    return "torch" if os.environ.get("NEAP_KERNELS", "") == "torch" else "auto"


def kernel_cache() -> str:
    """What engine.kernel_cache is where nobody says: the cache folder if it was moved, else the engine's default."""
    moved = os.environ.get("NEAP_CACHE", "") or os.environ.get("XDG_CACHE_HOME", "")
    return str(cache_dir()) if moved else ""


def child_environment(**changes: str) -> dict[str, str]:
    """What a child process gets: our environment, and `changes`."""
    return {**os.environ, **changes}


def prepare_ray() -> Path | None:
    """Set what Ray reads when it is imported: token authentication on, telemetry off. Call it before importing ray.

    Returns where the token lies (made here with mode 0600 if there is none yet), None if it is in RAY_AUTH_TOKEN.
    """
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",  # a busy machine takes longer than Ray's 60 s
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray starts a Python process per core in advance; here they would only compete with the workers' start
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
    }.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_AUTH_MODE"] = "token"  # whatever was set: Ray listens on all interfaces
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    return path
