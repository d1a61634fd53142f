"""A hybrid small enough for every test, with sizes that the kernels accept."""

from typing import Any, Protocol

import pytest
import torch

from zebra.models import ZebraConfig, ZebraForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "layer_types": ["mla", "mamba2", "attention", "mla"],
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "cache_page_size": 4,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


class MakeModel(Protocol):
    def __call__(self, **overrides: Any) -> ZebraForCausalLM: ...


@pytest.fixture
def make_config():
    return lambda **overrides: ZebraConfig(**(SIZES | overrides))


@pytest.fixture
def make_model(device: str) -> MakeModel:
    """Build the same seeded model on the device under test."""

    def make(**overrides: Any) -> ZebraForCausalLM:
        torch.manual_seed(1)
        model = ZebraForCausalLM(ZebraConfig(**(SIZES | overrides))).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is skipped
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model.to(device)

    return make
