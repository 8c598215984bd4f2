"""Which class runs a model_type."""

from __future__ import annotations

from engine.layers.options import LayerOptions
from engine.models.ernie45 import Ernie45ForCausalLM
from engine.models.ernie45_moe import Ernie45MoeForCausalLM
from engine.models.model_config import ModelConfig, ModelType

_MODELS: dict[ModelType, type[Ernie45ForCausalLM]] = {
    "ernie4_5": Ernie45ForCausalLM,
    "ernie4_5_moe": Ernie45MoeForCausalLM,
}


def build_model(config: ModelConfig, options: LayerOptions) -> Ernie45ForCausalLM:
    """The model with unset weights. Raises ValueError for sizes that its layers do not take."""
    return _MODELS[config.model_type](config, options)
