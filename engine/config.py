"""Options of one engine, each defined here once; the cluster file and the command line are generated from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["prefill", "decode"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Kernels = Literal["auto", "torch"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine (one rank). Sizes are tokens, blocks or bytes as named; times are milliseconds.

    `block_size` 0 picks 16 on CPU and 64 on CUDA. `max_model_len` 0 takes the checkpoint's. `kv_cache_bytes` bounds the
    one KV allocation. `served_block_fraction` caps the blocks that served Fetch calls may hold (ARCHITECTURE 1.4).
    `max_step_ms` bounds a step's predicted time; `max_batched_tokens` bounds it in tokens as well (buffer sizes).
    `steps_in_flight` 0 waits for each step; 1 schedules the next while one runs. `kernels` auto takes our own on CPU
    (float32, bfloat16) where a C compiler is, compiled into `kernel_cache` (empty: ~/.cache/neap); torch goes without.
    `threads` 0: two with our own kernels, as far as there are cores; with torch's one, whose bits depend on no batch.
    """

    model: str
    served_model_name: str = ""
    role: Role = "decode"
    dtype: DType = "auto"
    device: Device = "auto"
    threads: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 32
    max_num_served: int = 64
    max_batched_tokens: int = 2048
    max_step_ms: float = 500.0
    block_size: int = 0
    kv_cache_bytes: int = 512 << 20
    served_block_fraction: float = 0.9
    enable_prefix_caching: bool = True
    steps_in_flight: Literal[0, 1] = 0
    kernels: Kernels = "auto"
    kernel_cache: str = ""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        for name in ("max_num_seqs", "max_num_served", "max_batched_tokens", "kv_cache_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.served_block_fraction <= 1.0:
            raise ValueError(f"served_block_fraction must be in (0, 1], got {self.served_block_fraction}")
        if self.max_model_len < 0 or self.block_size < 0 or self.block_size % 16:
            raise ValueError("max_model_len must be >= 0 and block_size a multiple of 16")
