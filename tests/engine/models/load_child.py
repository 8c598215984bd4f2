"""Loads a model, packed for our kernels if there are any, and prints what memory that took, as JSON (bytes)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from engine.bench.memory import peak_rss_mib
from engine.kernels.cpu.build import KernelsUnavailable
from engine.kernels.cpu.library import CpuKernels
from engine.layers.options import LayerOptions
from engine.models.model_config import load_model_config
from engine.models.registry import build_model
from engine.models.safetensors_files import LoadAccount, read_header
from engine.models.weights import load_weights, shard_paths


def main(folder: Path, cache_dir: Path) -> None:
    try:
        kernels: CpuKernels | None = CpuKernels.load(cache_dir, 1)
    except KernelsUnavailable:
        kernels = None
    options = LayerOptions(device=torch.device("cpu"), dtype=torch.bfloat16, kernels=kernels)
    before = peak_rss_mib(os.getpid())
    model, account = build_model(load_model_config(folder), options), LoadAccount()
    load_weights(model, folder, account=account)
    after = peak_rss_mib(os.getpid())
    tensors = [tensor for path in shard_paths(folder) for tensor in read_header(path)]
    figures = {
        "model": sum(tensor.num_bytes for tensor in tensors),
        "layer": sum(tensor.num_bytes for tensor in tensors if tensor.name.startswith("model.layers.1.")),
        "loading": int((after - before) * 2**20),
        "buffers": account.buffers.peak_bytes,
        "unpacked": account.unpacked.peak_bytes,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
