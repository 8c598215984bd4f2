"""The name of the arithmetic an engine does: two engines with the same name give bit-equal results.

With torch's kernels and several CPU threads they need the same batches too (see LayerOptions), and the name says so.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.layers.options import LayerOptions

# Counts up whenever layers of torch's parts, or their padding, change any bit; our own kernels count by themselves.
KERNEL_VERSION = "torch-1"
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def numerics_class(options: LayerOptions, threads: int) -> str:
    """Device kind and capability, dtype, threads (torch on CPU), tensor-parallel size, versions: one line."""
    kernels, versions = KERNEL_VERSION, f"torch={torch.__version__}"
    if options.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(options.device)
        where = f"cuda sm{major}{minor} cuda{torch.version.cuda}"
    elif options.kernels is not None:
        # torch computes angles and samples, on one thread.
        where, kernels = f"cpu {torch.backends.cpu.get_cpu_capability()}", options.kernels.name
    else:
        variant = " batch-variant" if threads > 1 else ""
        where = f"cpu {torch.backends.cpu.get_cpu_capability()} {_cpu_features()} threads={threads}{variant}"
    return f"{where} {str(options.dtype).removeprefix('torch.')} tp=1 {versions} kernels={kernels}"


def _cpu_features() -> str:
    """Vendor and vector extensions: torch's libraries choose kernels by them."""
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in path.read_text().split("\n\n")[0].splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    found = "+".join(feature for feature in _CPU_FEATURES if feature in flags)
    return f"{fields.get('vendor_id', 'unknown')} {found or 'baseline'}"
