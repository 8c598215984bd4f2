"""The name of the arithmetic an engine does: two engines with the same name give bit-equal results.

With several CPU threads they need the same batches too (see LayerOptions), and the name says so.
"""

from __future__ import annotations

from pathlib import Path

import torch

# Counts up whenever layers or their padding change any bit.
KERNEL_VERSION = "torch-1"
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def numerics_class(device: torch.device, dtype: torch.dtype, threads: int) -> str:
    """Device kind and capability, dtype, threads (CPU), tensor-parallel size, torch and kernel versions, one line."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"cuda sm{major}{minor} cuda{torch.version.cuda}"
    else:
        variant = " batch-variant" if threads > 1 else ""
        where = f"cpu {torch.backends.cpu.get_cpu_capability()} {_cpu_features()} threads={threads}{variant}"
    return f"{where} {str(dtype).removeprefix('torch.')} tp=1 torch={torch.__version__} kernels={KERNEL_VERSION}"


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
