"""What a training run is given: the model's shape, rates, sizes of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Keys of config.json; vocab_size is added when the tokenizer has been trained.
EMBEDDED_SHAPE: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 128,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 5,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
    "moe_use_aux_free": True,
    "num_nextn_predict_layers": 1,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one run. `shape`: config.json without vocab_size. Sizes are in tokens, `decay` and progress in [0, 1]."""

    seed: int = 0
    shape: dict[str, Any] = field(default_factory=lambda: dict(EMBEDDED_SHAPE))
    vocab_size: int = 3072
    tokenizer_examples: int = 12000
    step_tokens: int = 4096
    micro_tokens: int = 2048
    max_length: int = 4096
    matrix_rate: float = 0.02
    other_rate: float = 0.004
    weight_decay: float = 0.1
    warmup_steps: int = 20
    decay: float = 0.45  # the last part of the run, in which the rates fall to 0
    second_weight: float = 0.2  # of the multi-token block's loss
    balance_weight: float = 0.01
    bias_rate: float = 0.001  # of the routers' correction, per step
    eval_steps: int = 100
    save_steps: int = 50
    threads: int = 2
    eval_questions: int = 20  # of each skill
    eval_length: int = 800  # longer questions are left to `neap eval`
    tokens: int = 20_000_000  # of the whole run: rates and curriculum follow them, not the clock

    def progress(self, num_tokens: int) -> float:
        """In [0, 1] after so many tokens; 1 is done."""
        return min(1.0, num_tokens / self.tokens)
