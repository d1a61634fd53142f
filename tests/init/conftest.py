"""Tiny random teachers of every supported family."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


@pytest.fixture
def make_teacher():
    def make(family: str = "llama", **options: Any):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **(SIZES | options))
        ).eval()
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.uniform_(p, 0.5, 1.5)
        return model

    return make
