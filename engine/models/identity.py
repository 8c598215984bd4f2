"""What a token's KV depends on besides the tokens: the root of every block key. Torch-free."""

from __future__ import annotations

from pathlib import Path

from engine.kv.layout import KVLayout
from engine.models.model_config import ModelConfig
from engine.models.weights import weights_digest


def cache_identity(model_dir: Path, config: ModelConfig, layout: KVLayout) -> str:
    """One line of text. Peers with the same identity may exchange blocks; the KV heads are the whole model's.

    Weights (see weights_digest), quantisation, KV dtype, rope, adapter and block size. Media hashes and cache salts
    join per request.
    """
    parts = {
        "weights": weights_digest(model_dir),
        "quant": "none",
        "kv": layout.dtype,
        "rope": f"{config.rope_theta:g}/{config.head_dim}/interleaved",
        "eps": f"{config.rms_norm_eps:g}",
        "adapter": "none",
        "block": layout.block_size,
    }
    return " ".join(f"{name}={value}" for name, value in parts.items())
