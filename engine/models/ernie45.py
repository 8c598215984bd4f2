"""ERNIE 4.5, dense (model_type ernie4_5), top to bottom; the MoE model shares everything but some MLPs.

T tokens, S sampled tokens, D model, N query heads, K KV heads, H head size, F hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from engine.forward_context import ForwardStep
from engine.kv.kv_cache import KVCache
from engine.layers.attention.attention import GatheredAttention
from engine.layers.attention.paged import PagedAttention
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.options import LayerOptions
from engine.layers.rotary import Angles, RotaryEmbedding
from engine.models.model_config import ModelConfig

Targets = Iterator[tuple[str, Tensor]]


class Attention(Protocol):
    """Rotates q and k, stores K and V, attends; paged with our own kernels, gathered with torch's."""

    def __call__(self, qkv: Tensor, angles: Angles, kv: KVCache, step: ForwardStep) -> Tensor: ...


class Ernie45Attention:
    """q, k, v as one linear; rotary positions on q and k; attention over the cache; o."""

    def __init__(self, layer: int, config: ModelConfig, options: LayerOptions) -> None:
        self._q_size, self._kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, self._q_size + 2 * self._kv_size, options)
        self.o_proj = Linear(self._q_size, config.hidden_size, options)
        if options.kernels is not None:
            self._attention: Attention = PagedAttention(layer, config.num_heads, options.kernels)
        else:
            self._attention = GatheredAttention(layer, config.num_heads, config.num_kv_heads, config.head_dim, options)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, angles: Angles, kv: KVCache, step: ForwardStep) -> Tensor:
        """residual + o(attention(x)), [T, D]."""
        return self.o_proj(self._attention(self.qkv_proj(x_TD), angles, kv, step), residual_TD)

    def targets(self, prefix: str) -> Targets:
        """Checkpoint names and where they go."""
        q_end, k_end = self._q_size, self._q_size + self._kv_size
        yield f"{prefix}q_proj.weight", self.qkv_proj.weight[:q_end]
        yield f"{prefix}k_proj.weight", self.qkv_proj.weight[q_end:k_end]
        yield f"{prefix}v_proj.weight", self.qkv_proj.weight[k_end:]
        yield f"{prefix}o_proj.weight", self.o_proj.weight

    def pack(self) -> None:
        """After loading."""
        self.qkv_proj.pack()
        self.o_proj.pack()


class Ernie45MLP:
    """down(silu(gate(x)) * up(x)), gate and up as one linear."""

    def __init__(self, hidden_size: int, intermediate_size: int, options: LayerOptions) -> None:
        self._intermediate_size = intermediate_size
        self.gate_up_proj = Linear(hidden_size, intermediate_size, options, gated=True)
        self.down_proj = Linear(intermediate_size, hidden_size, options)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        """[T, D], added to the residual if there is one."""
        return self.down_proj(self.gate_up_proj(x_TD), residual_TD)

    def forward(self, x_TD: Tensor, residual_TD: Tensor, step: ForwardStep) -> Tensor:
        """residual + mlp(x), [T, D]; a dense MLP takes padding like any token."""
        return self(x_TD, residual_TD)

    def targets(self, prefix: str) -> Targets:
        """Checkpoint names and where they go."""
        yield f"{prefix}gate_proj.weight", self.gate_up_proj.weight[: self._intermediate_size]
        yield f"{prefix}up_proj.weight", self.gate_up_proj.weight[self._intermediate_size :]
        yield f"{prefix}down_proj.weight", self.down_proj.weight

    def pack(self) -> None:
        """After loading."""
        self.gate_up_proj.pack()
        self.down_proj.pack()


class DecoderMLP(Protocol):
    """The MLP stage of a layer: dense, or a mixture of experts."""

    def forward(self, x_TD: Tensor, residual_TD: Tensor, step: ForwardStep) -> Tensor: ...

    def targets(self, prefix: str) -> Targets: ...

    def pack(self) -> None: ...


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)): two stages apart, so that half-batches can overlap later."""

    def __init__(self, layer: int, config: ModelConfig, options: LayerOptions, mlp: DecoderMLP) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, options)
        self.self_attn = Ernie45Attention(layer, config, options)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, options)
        self.mlp = mlp

    def attention_stage(self, x_TD: Tensor, angles: Angles, kv: KVCache, step: ForwardStep) -> Tensor:
        """[T, D]."""
        return self.self_attn(self.input_layernorm(x_TD), x_TD, angles, kv, step)

    def mlp_stage(self, x_TD: Tensor, step: ForwardStep) -> Tensor:
        """[T, D]."""
        return self.mlp.forward(self.post_attention_layernorm(x_TD), x_TD, step)

    def targets(self, prefix: str) -> Targets:
        """Checkpoint names and where they go."""
        yield f"{prefix}input_layernorm.weight", self.input_layernorm.weight
        yield f"{prefix}post_attention_layernorm.weight", self.post_attention_layernorm.weight
        yield from self.self_attn.targets(f"{prefix}self_attn.")
        yield from self.mlp.targets(f"{prefix}mlp.")

    def pack(self) -> None:
        """After loading."""
        self.self_attn.pack()
        self.mlp.pack()


class Ernie45ForCausalLM:
    """Embedding, decoder layers, final norm, LM head (the embedding's table where tied)."""

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        self.config = config
        self.options = options
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, options)
        self.layers = [DecoderLayer(layer, config, options, self.make_mlp(layer)) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, options)
        self._rotary = RotaryEmbedding(config.head_dim, config.rope_theta, options.device)
        # Tied: the embedding's own table gives the logits.
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, options)

    def make_mlp(self, layer: int) -> DecoderMLP:
        """The MLP of one layer."""
        return Ernie45MLP(self.config.hidden_size, self.config.intermediate_size, self.options)

    def hidden(self, step: ForwardStep, kv: KVCache) -> Tensor:
        """[T, D] after the last layer, before the final norm. Writes the step's K and V."""
        x_TD = self.embed_tokens(step.token_ids)
        angles = self._rotary.angles(step.positions)
        for layer in self.layers:
            x_TD = layer.attention_stage(x_TD, angles, kv, step)
            x_TD = layer.mlp_stage(x_TD, step)
        return x_TD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """float32 [S, V] of chosen rows of `hidden`; S is padded like any step."""
        normed_SD = self.norm(hidden_SD)
        if self.lm_head is None:
            return self.embed_tokens.logits(normed_SD)
        return self.lm_head(normed_SD, out_dtype=torch.float32)

    def targets(self) -> Targets:
        """Every checkpoint name this model needs, and the tensor (or part of one) that it is loaded into."""
        yield "model.embed_tokens.weight", self.embed_tokens.weight
        for index, layer in enumerate(self.layers):
            yield from layer.targets(f"model.layers.{index}.")
        yield "model.norm.weight", self.norm.weight
        if self.lm_head is not None:
            yield "lm_head.weight", self.lm_head.weight
