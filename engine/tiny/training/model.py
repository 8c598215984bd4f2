"""ERNIE 4.5 MoE in plain torch, for training: whole sequences, no KV cache, gradients. Float32.

T tokens of all sequences, one after the other (a padded table of B sequences of S only inside attention), D model,
N query heads, H head size, E experts, F hidden, V vocabulary. Parameters have the names of the checkpoint, but that the
experts of a layer are stacked into one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from engine.tiny.training.functions import mixture, normalize, padded, rotate, swiglu, unpadded

Config = Mapping[str, Any]  # config.json's own keys


def _matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * (gain / shape[-1] ** 0.5))


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Sequences, one after the other: `tokens`, `positions` int64 [T].

    fill [B, S], place [T]: the padded table that attention works on, see `functions.padded`.
    """

    tokens: Tensor
    positions: Tensor
    fill: Tensor
    place: Tensor


@dataclass(frozen=True, kw_only=True)
class Loads:
    """What the mixtures of one forward pass did, layer by layer, in order.

    counts: int64 [E], tokens that each expert took. balance: the loss term of evenness, 1 when even.
    """

    counts: list[Tensor] = field(default_factory=list)
    balance: list[Tensor] = field(default_factory=list)


class Weight(nn.Module):
    """One tensor named `weight`, so that parameter names are the checkpoint's."""

    def __init__(self, *shape: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = _matrix(*shape, gain=gain)


class Norm(nn.Module):
    """RMSNorm; `folded` gives its weight to the linear that follows, which is cheaper than scaling activations."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return normalize(x, self.eps) * self.weight

    def folded(self, x: Tensor) -> Tensor:
        """Without the weight."""
        return normalize(x, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, size: int, gain: float) -> None:
        super().__init__()
        self.gate_proj = Weight(size, hidden_size)
        self.up_proj = Weight(size, hidden_size)
        self.down_proj = Weight(hidden_size, size, gain=gain)

    def forward(self, x_TD: Tensor, loads: Loads | None = None) -> Tensor:
        """[T, D]. A dense MLP has no loads to tell."""
        gate_up = linear(x_TD, torch.cat((self.gate_proj.weight, self.up_proj.weight)))
        return linear(swiglu(gate_up), self.down_proj.weight)


class Bias(nn.Module):
    """The correction of the scores in choosing experts; moved by load, not by gradients."""

    e_score_correction_bias: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(1, num_experts))


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate, up [E, F, D], down [E, D, F]."""

    def __init__(self, num_experts: int, hidden_size: int, size: int, gain: float) -> None:
        super().__init__()
        self.gate_proj = _matrix(num_experts, size, hidden_size)
        self.up_proj = _matrix(num_experts, size, hidden_size)
        self.down_proj = _matrix(num_experts, hidden_size, size, gain=gain)


class MoE(nn.Module):
    """Routed experts and the shared ones."""

    def __init__(self, config: Config, gain: float) -> None:
        super().__init__()
        size, hidden_size = config["moe_intermediate_size"], config["hidden_size"]
        self.top_k: int = config["moe_k"]
        self.gate = Weight(config["moe_num_experts"], hidden_size)
        self.moe_statics = Bias(config["moe_num_experts"])
        self.experts = Experts(config["moe_num_experts"], hidden_size, size, gain)
        self.shared_experts = MLP(hidden_size, size * config["moe_num_shared_experts"], gain)

    def forward(self, x_TD: Tensor, loads: Loads) -> Tensor:
        """[T, D]."""
        scores_TE = torch.softmax(linear(x_TD, self.gate.weight), dim=-1)
        with torch.no_grad():
            ids_TK = torch.topk(scores_TE + self.moe_statics.e_score_correction_bias, self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        gate_up = torch.cat((self.experts.gate_proj, self.experts.up_proj), 1)
        routed_TD, counts_E = mixture(x_TD, ids_TK, weights_TK, gate_up, self.experts.down_proj)
        loads.counts.append(counts_E)
        # Switch Transformer's balance loss: E * sum over experts of (share of choices) * (mean score); 1 when even.
        loads.balance.append((scores_TE.mean(0) * counts_E / ids_TK.numel()).sum() * len(counts_E))
        return cast(Tensor, self.shared_experts(x_TD)) + routed_TD


class Attention(nn.Module):
    """Causal attention with grouped KV heads and interleaved rotary positions."""

    def __init__(self, config: Config, gain: float) -> None:
        super().__init__()
        self.head_dim: int = config["head_dim"]
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config["num_key_value_heads"]
        hidden_size, q_size = config["hidden_size"], self.num_heads * self.head_dim
        self.q_proj = Weight(q_size, hidden_size)
        self.k_proj = Weight(self.num_kv_heads * self.head_dim, hidden_size)
        self.v_proj = Weight(self.num_kv_heads * self.head_dim, hidden_size)
        self.o_proj = Weight(hidden_size, q_size, gain=gain)

    def forward(self, x_TD: Tensor, norm_D: Tensor, turns_TH: Tensor, packed: Packed) -> Tensor:
        """[T, N * H], before o_proj. `norm_D` is the weight of the norm before."""
        qkv = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)) * norm_D
        heads = linear(x_TD, qkv).view(len(x_TD), -1, self.head_dim)
        split = self.num_heads + self.num_kv_heads
        turned = padded(rotate(heads[:, :split], turns_TH), packed.fill, packed.place).transpose(1, 2)
        v = padded(heads[:, split:], packed.fill, packed.place).transpose(1, 2)
        q, k = turned[:, : self.num_heads], turned[:, self.num_heads :]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return unpadded(out.transpose(1, 2).flatten(2), packed.place)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with experts or dense."""

    def __init__(self, config: Config, gain: float, *, moe: bool) -> None:
        super().__init__()
        hidden_size, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = Norm(hidden_size, eps)
        self.self_attn = Attention(config, gain)
        self.post_attention_layernorm = Norm(hidden_size, eps)
        self.mlp: nn.Module = MoE(config, gain) if moe else MLP(hidden_size, config["intermediate_size"], gain)

    def forward(
        self, x_TD: Tensor, turns_TH: Tensor, packed: Packed, loads: Loads, rows: Tensor | None = None
    ) -> Tensor:
        """[T, D], or only the chosen rows of it (everything after the attention is per token)."""
        norm = self.input_layernorm
        attended = self.self_attn(norm.folded(x_TD), norm.weight, turns_TH, packed)
        if rows is not None:
            attended, x_TD = attended.index_select(0, rows), x_TD.index_select(0, rows)
        x_TD = x_TD + linear(attended, self.self_attn.o_proj.weight)
        return x_TD + cast(Tensor, self.mlp(self.post_attention_layernorm(x_TD), loads))


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Logits [L, V] at the chosen rows: of the next token, and (from the multi-token block) of the second next."""

    next: Tensor
    second: Tensor
    loads: Loads


class TinyErnie(nn.Module):
    """The model with its multi-token-prediction block. `config` has config.json's own keys."""

    turns: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden_size, eps, num_layers = config["hidden_size"], config["rms_norm_eps"], config["num_hidden_layers"]
        gain = (2 * num_layers) ** -0.5
        self.embed_tokens = Weight(config["vocab_size"], hidden_size)
        self.layers = nn.ModuleList(Layer(config, gain, moe=index > 0) for index in range(num_layers))
        self.norm = Norm(hidden_size, eps)
        self.mtp_emb_norm = nn.ModuleList([Norm(hidden_size, eps)])
        self.mtp_hidden_norm = nn.ModuleList([Norm(hidden_size, eps)])
        self.mtp_linear_proj = nn.ModuleList([Weight(hidden_size, 2 * hidden_size)])
        self.mtp_block = nn.ModuleList([Layer(config, gain, moe=False)])
        steps = torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
        positions = torch.arange(config["max_position_embeddings"], dtype=torch.float64)
        angles = torch.outer(positions, config["rope_theta"] ** -steps).float()
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixtures, from the first layer that has one."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """[L, V] of rows before the final norm; the table of the embedding is the head."""
        return linear(self.norm.folded(hidden_LD), self.embed_tokens.weight * self.norm.weight)

    def forward(self, packed: Packed, rows: Tensor) -> Predictions:
        """Predictions at `rows`, indices into [T]: after row r come tokens r + 1 and r + 2."""
        embedded_TD = embedding(packed.tokens, self.embed_tokens.weight)
        turns_TH = self.turns[packed.positions]
        loads, x_TD = Loads(), embedded_TD
        for layer in self.layers:
            x_TD = layer(x_TD, turns_TH, packed, loads)
        # The multi-token block sees at t the embedding of x[t + 1], first, and h[t]; then comes a dense layer. The last
        # token of a sequence has no next one: it is given another's, and nobody looks at what comes out.
        known_TD, hidden_TD = self.mtp_emb_norm[0](embedded_TD.roll(-1, 0)), self.mtp_hidden_norm[0](x_TD)
        pair_TD = linear(torch.cat((known_TD, hidden_TD), -1), cast(Weight, self.mtp_linear_proj[0]).weight)
        second_LD = self.mtp_block[0](pair_TD, turns_TH, packed, loads, rows)
        next_LV = self.logits(x_TD.index_select(0, rows))
        return Predictions(next=next_LV, second=self.logits(second_LD), loads=loads)
