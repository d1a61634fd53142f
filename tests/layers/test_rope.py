import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zebra.layers import RotaryEmbedding, rope_frequencies

YARN = {
    "1b": (32, 32.0, {0: 1.0, 1: 4.403666e-01, 4: 3.760603e-02, 5: 1.335185e-02,
                      8: 3.181981e-04, 9: 1.946164e-05, 15: 1.419272e-07}),
    "3b": (64, 32.0, {0: 1.0, 1: 6.636012e-01, 9: 2.495541e-02, 10: 1.477789e-02,
                      17: 1.303436e-04, 18: 1.946164e-05, 31: 9.418307e-08}),
    "8b": (64, 8.0, {0: 1.0, 9: 2.495541e-02, 10: 1.495040e-02, 17: 2.085497e-04,
                     18: 7.784655e-05, 31: 3.767323e-07}),
}  # fmt: skip


def yarn(factor: float) -> dict:
    return {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": factor,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("size", YARN)
def test_yarn_frequencies_are_the_published_ones(size: str) -> None:
    dim, factor, values = YARN[size]
    frequency, magnitude = rope_frequencies(dim, yarn(factor))
    for i, want in values.items():
        assert float(frequency[i]) == pytest.approx(want, rel=1e-6)
    want = {32.0: 1.3465736, 8.0: 1.2079442}[factor]
    assert magnitude == pytest.approx(want, rel=1e-7)
    assert magnitude**2 == pytest.approx({32.0: 1.8132604, 8.0: 1.4591291}[factor], rel=1e-7)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
         "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
         "attention_factor": 1.25, "truncate": False},
    ],
    ids=lambda p: p["rope_type"],
)  # fmt: skip
def test_frequencies_equal_transformers(parameters: dict) -> None:
    parameters = {"rope_theta": 10000.0} | parameters
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters=dict(parameters),
    )
    want, want_magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    frequency, magnitude = rope_frequencies(64, parameters)
    torch.testing.assert_close(frequency.float(), want, rtol=2e-6, atol=0)
    assert magnitude == pytest.approx(want_magnitude)


def test_tables_hold_the_magnitude_and_stay_fp32(device: str) -> None:
    rotary = RotaryEmbedding(32, 64, yarn(32.0)).to(torch.bfloat16)
    cos, sin = rotary.tables(torch.device(device))
    assert cos.shape == sin.shape == (64, 16)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close((cos**2 + sin**2).cpu(), torch.full((64, 16), 1.8132604))
    assert cos[7, 0].item() == pytest.approx(1.3465736 * math.cos(7), rel=1e-6)
    assert rotary.tables(torch.device(device))[0].data_ptr() == cos.data_ptr()


def test_embedding_built_on_meta_has_real_tables() -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(32, 8, yarn(32.0))
    assert rotary.tables(torch.device("cpu"))[0].device.type == "cpu"


@pytest.mark.parametrize(
    ("dim", "parameters", "text"),
    [
        (32, {"rope_type": "dynamic", "rope_theta": 1e4}, "rope_type must be one of"),
        (31, {"rope_theta": 1e4}, "must be even"),
        (32, {}, "rope_theta"),
        (32, {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor"),
        (32, yarn(4.0) | {"original_max_position_embeddings": None}, "original_max"),
        (32, yarn(4.0) | {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 1},
         "high_freq_factor must exceed"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_rope_is_refused_by_name(dim: int, parameters: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rope_frequencies(dim, parameters)
