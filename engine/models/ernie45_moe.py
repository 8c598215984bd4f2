"""ERNIE 4.5 with experts (model_type ernie4_5_moe): the dense model, but for the MLPs of the layers that mix experts.

T tokens, D model.
"""

from __future__ import annotations

from torch import Tensor

from engine.forward_context import ForwardStep
from engine.layers.moe.all_to_all import LocalAllToAll
from engine.layers.moe.experts import Experts
from engine.layers.moe.moe import KernelMoE, MoE
from engine.layers.moe.router import Router
from engine.layers.options import LayerOptions
from engine.models.ernie45 import DecoderMLP, Ernie45ForCausalLM, Ernie45MLP, Targets
from engine.models.model_config import ModelConfig, MoEConfig


class Ernie45MoEMLP:
    """Routed experts, and the shared ones as one MLP (absent in the 300B model)."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, options: LayerOptions) -> None:
        self._intermediate_size = moe.intermediate_size
        self.router = Router(config.hidden_size, moe.num_experts, moe.top_k, moe.norm_min, options)
        self.experts = Experts(moe.num_experts, config.hidden_size, moe.intermediate_size, options)
        self.shared_experts: Ernie45MLP | None = None
        if moe.num_shared_experts:
            shared_size = moe.num_shared_experts * moe.intermediate_size
            self.shared_experts = Ernie45MLP(config.hidden_size, shared_size, options)
        if options.kernels is not None:
            self._moe: MoE | KernelMoE = KernelMoE(self.router, self.experts, self.shared_experts, options.kernels)
        else:
            all_to_all = LocalAllToAll(moe.num_experts, options)
            self._moe = MoE(self.router, self.experts, all_to_all, self.shared_experts)

    def forward(self, x_TD: Tensor, residual_TD: Tensor, step: ForwardStep) -> Tensor:
        """residual + mixture(x), [T, D]."""
        return self._moe(x_TD, residual_TD, step.valid)

    def targets(self, prefix: str) -> Targets:
        """Checkpoint names and where they go. The bias is stored as [1, E]."""
        yield f"{prefix}gate.weight", self.router.gate.weight
        yield f"{prefix}moe_statics.e_score_correction_bias", self.router.correction_bias[None]
        size = self._intermediate_size
        for index in range(self.experts.num_experts):
            yield f"{prefix}experts.{index}.gate_proj.weight", self.experts.gate_up[index, :size]
            yield f"{prefix}experts.{index}.up_proj.weight", self.experts.gate_up[index, size:]
            yield f"{prefix}experts.{index}.down_proj.weight", self.experts.down[index]
        if self.shared_experts is not None:
            yield from self.shared_experts.targets(f"{prefix}shared_experts.")

    def pack(self) -> None:
        """After loading."""
        self._moe.pack()
        if self.shared_experts is not None:
            self.shared_experts.pack()


class Ernie45MoeForCausalLM(Ernie45ForCausalLM):
    """The dense model with experts in `config.moe.layer_ids`."""

    def make_mlp(self, layer: int) -> DecoderMLP:
        """The MLP of one layer: dense, or a mixture of experts."""
        moe = self.config.moe
        assert moe is not None, "the registry gives this class MoE configs only"
        if layer in moe.layer_ids:
            return Ernie45MoEMLP(self.config, moe, self.options)
        return super().make_mlp(layer)
