"""Hugging Face models; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from zebra.models.configuration_zebra import (
    LAYER_TYPES,
    PRESETS,
    ZebraConfig,
    kv_cache_report,
    layer_types_of,
)
from zebra.models.modeling_zebra import ZebraForCausalLM, ZebraModel, ZebraOutput

AutoConfig.register(ZebraConfig.model_type, ZebraConfig, exist_ok=True)
AutoModel.register(ZebraConfig, ZebraModel, exist_ok=True)
AutoModelForCausalLM.register(ZebraConfig, ZebraForCausalLM, exist_ok=True)

__all__ = [
    "LAYER_TYPES",
    "PRESETS",
    "ZebraConfig",
    "ZebraForCausalLM",
    "ZebraModel",
    "ZebraOutput",
    "kv_cache_report",
    "layer_types_of",
]
