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
from engine.layers.activation import silu_and_mul
from engine.layers.attention.attention import Attention
from engine.layers.embedding import Embedding
from engine.layers.linear import LibraryLinear, Linear
from engine.layers.norm import RMSNorm
from engine.layers.options import LayerOptions
from engine.layers.rotary import RotaryEmbedding
from engine.models.model_config import ModelConfig

Targets = Iterator[tuple[str, Tensor]]
Angles = tuple[Tensor, Tensor]


class Ernie45Attention:
    """q, k, v as one linear; rotary positions on q and k; attention over the cache; o."""

    def __init__(self, layer: int, config: ModelConfig, options: LayerOptions) -> None:
        self._num_heads, self._num_kv_heads, self._head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._q_size, self._kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, self._q_size + 2 * self._kv_size, options)
        self.o_proj = Linear(self._q_size, config.hidden_size, options)
        self._attention = Attention(layer, config.num_heads, config.num_kv_heads, config.head_dim, options)

    def __call__(self, x_TD: Tensor, angles: Angles, kv: KVCache, step: ForwardStep) -> Tensor:
        """[T, D]."""
        num_tokens, num_rotated = x_TD.shape[0], self._num_heads + self._num_kv_heads
        qkv = self.qkv_proj(x_TD).view(num_tokens, num_rotated + self._num_kv_heads, self._head_dim)
        qk = RotaryEmbedding.rotate(qkv[:, :num_rotated], *angles)
        q_TNH, k_TKH, v_TKH = qk[:, : self._num_heads], qk[:, self._num_heads :], qkv[:, num_rotated:]
        return self.o_proj(self._attention(q_TNH, k_TKH, v_TKH, kv, step))

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
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, options)
        self.down_proj = Linear(intermediate_size, hidden_size, options)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D]."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x_TD)))

    def forward(self, x_TD: Tensor, step: ForwardStep) -> Tensor:
        """[T, D]; a dense MLP takes padding like any token."""
        return self(x_TD)

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

    def forward(self, x_TD: Tensor, step: ForwardStep) -> Tensor: ...

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
        return x_TD + self.self_attn(self.input_layernorm(x_TD), angles, kv, step)

    def mlp_stage(self, x_TD: Tensor, step: ForwardStep) -> Tensor:
        """[T, D]."""
        return x_TD + self.mlp.forward(self.post_attention_layernorm(x_TD), step)

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
        self._head_method = LibraryLinear(options)
        self._head_weight = self.embed_tokens.weight
        if not config.tie_word_embeddings:
            self._head_weight = torch.empty_like(self.embed_tokens.weight)

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
        return self._head_method.apply(self.norm(hidden_SD), self._head_packed).float()

    def targets(self) -> Targets:
        """Every checkpoint name this model needs, and the tensor (or part of one) that it is loaded into."""
        yield "model.embed_tokens.weight", self.embed_tokens.weight
        for index, layer in enumerate(self.layers):
            yield from layer.targets(f"model.layers.{index}.")
        yield "model.norm.weight", self.norm.weight
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self._head_weight

    def pack(self) -> None:
        """After loading: every weight takes the form that its method reads."""
        self._head_packed = self._head_method.pack(self._head_weight)
        for layer in self.layers:
            layer.pack()
