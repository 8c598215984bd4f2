"""What a process is told when it is started: plain data, handed over as JSON (cluster/config.py makes it).

One spec per process keeps the environment and the command line out of the processes' code.
"""

from __future__ import annotations

import msgspec

from engine.config import EngineConfig, Role


class FakeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Run the exact fake model instead of a checkpoint. Speeds in milliseconds."""

    vocab_size: int = 512
    num_blocks: int = 4096
    block_size: int = 16
    max_model_len: int = 8192
    fixed_ms: float = 0.0
    ms_per_token: float = 0.0
    stop_probability: float = 0.0


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. `registry` is host:port; empty means that nobody is told (tests)."""

    worker_id: str
    pool: str
    role: Role
    engine: EngineConfig
    fake: FakeSpec | None = None
    host: str = "127.0.0.1"
    port: int = 0
    registry: str = ""
    node: str = ""
    transports: tuple[str, ...] = ("local", "grpc")
    link_outbox_tokens: int = 65536
    log_dir: str = ""
    failpoint: str = ""  # tests only, and no option of the cluster file: see cluster/worker/failpoints.py


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One router. Limits are per request unless named otherwise; sizes in bytes, times in seconds."""

    router_id: str
    model_path: str
    served_model_name: str
    registry: str
    host: str = "127.0.0.1"
    port: int = 8180
    metrics_port: int = 0
    api_key: str = ""
    policy: str = "predicted"
    max_queue: int = 256
    max_body_bytes: int = 4 << 20
    max_running: int = 1024
    default_timeout_s: float = 600.0
    stream_buffer_bytes: int = 256 << 10
    require_prefill: bool = False
    traffic_window_s: float = 20.0


class RolesSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner (cluster/control/planner.py) is to keep to. Shares are of 1."""

    auto: bool = True
    ttft_ms: float = 1000.0
    tpot_ms: float = 50.0
    interval_s: float = 0.5
    act_at: float = 0.75
    hysteresis: float = 0.08
    min_role_s: float = 30.0
    horizon_s: float = 30.0
    max_switches: int = 4
    switch_timeout_s: float = 10.0
