"""How checkpoints name and store what a model needs: the `-PT` layout as it is, and `-Paddle` translated to it.

`-Paddle` differs from `-PT` (shared/reference/ernie45.md 1.7):

    ernie.layers.0...                       model.layers.0...
    every linear [in, out]                  [out, in]; the router's gate too
    self_attn.qkv_proj.weight [in, q|k|v]   q_proj, k_proj, v_proj
    mlp.up_gate_proj.weight [in, gate|up]   gate_proj, up_proj
"""

from __future__ import annotations

from dataclasses import dataclass

_PADDLE_PREFIX = "ernie."
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("gate_proj", "up_proj")}
_QUANTISED = (".quant_weight", ".weight_scale", ".activation_scale", ".super_scales", ".code_scale", ".code_zp")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a stored tensor goes: `names` in the `-PT` layout, behind one another along their first dimension.

    `transposed`: it is stored as [in, out]. None: as its shape says (an untied LM head has been seen both ways).
    """

    names: tuple[str, ...]
    transposed: bool | None


def placement(name: str) -> Placement:
    """Of a tensor by its name in the checkpoint. Raises ValueError for quantised weights."""
    if name.endswith(_QUANTISED):
        raise ValueError(f"{name}: quantised weights are not supported (supported: float32, bfloat16, float16)")
    if name == "lm_head.weight":
        return Placement(names=(name,), transposed=None)
    if not name.startswith(_PADDLE_PREFIX):
        return Placement(names=(name,), transposed=False)
    name = "model." + name.removeprefix(_PADDLE_PREFIX)
    stem, _, suffix = name.rpartition(".")
    parent, _, kind = stem.rpartition(".")
    if kind in _FUSED:
        return Placement(names=tuple(f"{parent}.{part}.{suffix}" for part in _FUSED[kind]), transposed=True)
    is_linear = suffix == "weight" and (kind.endswith("_proj") or stem.endswith(".mlp.gate"))
    return Placement(names=(name,), transposed=is_linear)
