"""What one simulated worker is."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import Role
from engine.fake_engine import FakeConfig


@dataclass(frozen=True, kw_only=True)
class SimWorkerConfig:
    """One worker. Workers on different `host`s cannot open each other's memory. Times in seconds.

    A step takes its predicted time, or up to `step_jitter` of it more or less.
    """

    worker_id: str
    role: Role
    engine: FakeConfig = field(default_factory=FakeConfig)
    host: str = "host-1"
    copy_s: float = 0.0005
    copy_s_per_block: float = 0.0001
    step_jitter: float = 0.0
