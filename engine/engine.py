"""Builds an engine from its options: the one place where checkpoint, device, memory and scheduler come together.

1. config.json -> model, dtype, lengths       errors of the user end here, before anything large is allocated
2. weights -> device                          progress "load" in bytes
3. KV memory within kv_cache_bytes            shared (memfd) on CPU
4. warm-up -> StepCost                        progress "warmup" in shapes
5. scheduler + runner -> EngineCore
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.kernels.cpu.build import KernelsUnavailable
from engine.kernels.cpu.library import DTYPES as KERNEL_DTYPES
from engine.kernels.cpu.library import CpuKernels
from engine.kv.block_manager import BlockManager
from engine.kv.kv_cache import KVCache
from engine.kv.layout import KVLayout
from engine.kv.memory import KVMemory
from engine.layers.options import LayerOptions
from engine.models.ernie45 import Ernie45ForCausalLM
from engine.models.identity import cache_identity
from engine.models.model_config import ModelConfig, load_model_config
from engine.models.registry import build_model
from engine.models.weights import load_weights, shard_paths
from engine.runner.model_runner import ModelRunner
from engine.runner.numerics_class import numerics_class
from engine.runner.profile import measure_profile
from engine.runner.warmup import measure_step_cost
from engine.scheduler.profile import Profile
from engine.scheduler.request_state import ModelLimits
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_cost import StepCost

_log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
_DEFAULT_THREADS = 2  # of our own kernels: the bits are the same on any number
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """A warm engine, and what its rank tells others about it (engine/messages.py, RankReady).

    `memory` is the shared KV memory (None on CUDA); it is the caller's to close after the last step.
    """

    core: EngineCore
    runner: ModelRunner
    layout: KVLayout
    memory: KVMemory | None
    model_config: ModelConfig
    max_model_len: int
    identity: str
    numerics_class: str

    def measure_profile(self, config: EngineConfig) -> Profile:
        """What a worker tells others of its speed; takes a second at most. To be called before the first step."""
        return measure_profile(
            self.runner,
            self.core.step_cost,
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_step_ms=config.max_step_ms,
            max_step_tokens=config.max_batched_tokens,
            kv_token_bytes=self.layout.token_bytes,
        )

    @property
    def checksum_algorithm(self) -> str:
        """How this engine digests blocks."""
        return self.runner.checksum_algorithm


def build_engine(
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    capture_logits: bool = False,
    options: LayerOptions | None = None,
) -> BuiltEngine:
    """Load, size, warm up and join one engine. Sets this process's torch threads.

    `progress(stage, done, total)`, stages as RankProgress has them. `capture_logits` and `options` (other padding than
    exactness wants) are for tests. Raises ValueError, naming the option or the checkpoint's key, for whatever the user
    can cause.
    """
    model_dir = Path(config.model)
    shard_paths(model_dir)  # a folder without weights is refused before anything else
    model_config = load_model_config(model_dir)
    device = _device(config.device)
    dtype_name = model_config.dtype if config.dtype == "auto" else config.dtype
    layout = _layout(config, model_config, device, dtype_name)
    max_model_len = _max_model_len(config, model_config, layout)
    options = options or _layer_options(config, device, _DTYPES[dtype_name])
    _configure_torch(config.threads or 1, options)
    model = build_model(model_config, options)
    load_weights(model, model_dir, _staged(progress, "load"))
    runner = _runner(config, model, layout, max_model_len, capture_logits)
    step_cost = measure_step_cost(
        runner,
        max_model_len=max_model_len,
        max_batched_tokens=config.max_batched_tokens,
        progress=_staged(progress, "warmup"),
    )
    identity = cache_identity(model_dir, model_config, layout)
    limits = ModelLimits(
        identity=identity,
        max_model_len=max_model_len,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
    )
    scheduler = _scheduler(config, layout, limits, step_cost)
    return BuiltEngine(
        core=EngineCore(scheduler=scheduler, runner=runner, steps_in_flight=config.steps_in_flight),
        runner=runner,
        layout=layout,
        memory=runner.kv.memory,
        model_config=model_config,
        max_model_len=max_model_len,
        identity=identity,
        numerics_class=numerics_class(options, config.threads or 1),
    )


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device is cuda, but torch finds no CUDA device")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _layout(config: EngineConfig, model: ModelConfig, device: torch.device, dtype_name: str) -> KVLayout:
    return KVLayout.within(
        config.kv_cache_bytes,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=config.block_size or (64 if device.type == "cuda" else 16),
        head_dim=model.head_dim,
        dtype=dtype_name,  # type: ignore[arg-type]  # the names of _DTYPES are KV dtypes
    )


def _max_model_len(config: EngineConfig, model: ModelConfig, layout: KVLayout) -> int:
    """The length asked for, or else the checkpoint's as far as one request of it fits the KV memory."""
    fits = (layout.num_blocks - 1) * layout.block_size
    if not config.max_model_len:
        return min(model.max_position_embeddings, fits)
    if config.max_model_len > model.max_position_embeddings:
        raise ValueError(f"max_model_len {config.max_model_len} is above the model's {model.max_position_embeddings}")
    if config.max_model_len > fits:
        raise ValueError(
            f"max_model_len {config.max_model_len} needs {layout.token_bytes * config.max_model_len} bytes of KV, but "
            f"kv_cache_bytes {config.kv_cache_bytes} holds {fits} tokens"
        )
    return config.max_model_len


def _layer_options(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> LayerOptions:
    """Our own kernels on the CPU where they run, else torch's."""
    if config.kernels == "torch" or device.type != "cpu" or dtype not in KERNEL_DTYPES:
        return LayerOptions(device=device, dtype=dtype)
    threads = config.threads or min(_DEFAULT_THREADS, len(os.sched_getaffinity(0)))
    cache_dir = Path(config.kernel_cache) if config.kernel_cache else Path.home() / ".cache" / "neap"
    try:
        return LayerOptions(device=device, dtype=dtype, kernels=CpuKernels.load(cache_dir, threads))
    except KernelsUnavailable as error:
        _log.warning("serving with torch's kernels, which are slower: %s", error)
        return LayerOptions(device=device, dtype=dtype)


def _configure_torch(threads: int, options: LayerOptions) -> None:
    # Our kernels have threads of their own; a second pool would compete with them for the cores.
    torch.set_num_threads(threads if options.kernels is None else 1)
    if threads > 1 and options.device.type == "cpu" and options.kernels is None:
        _log.warning("threads=%d: the last bits of results may depend on the batch; threads=1 is exact", threads)
    # Sums in full precision: reduced ones depend on how the library splits them.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")


def _scheduler(config: EngineConfig, layout: KVLayout, limits: ModelLimits, step_cost: StepCost) -> Scheduler:
    blocks = BlockManager(
        num_blocks=layout.num_blocks,
        block_size=layout.block_size,
        served_fraction=config.served_block_fraction,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    return Scheduler(config, limits=limits, blocks=blocks, step_cost=step_cost)


def _runner(
    config: EngineConfig, model: Ernie45ForCausalLM, layout: KVLayout, max_model_len: int, capture_logits: bool
) -> ModelRunner:
    device = model.options.device
    kv = KVCache.on_device(layout, device) if device.type == "cuda" else KVCache.in_memory(KVMemory.create(layout))
    return ModelRunner(
        model,
        kv,
        num_rows=config.max_num_seqs + config.max_num_served,
        max_model_len=max_model_len,
        capture_logits=capture_logits,
    )


def _staged(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)
