"""Layers usable in any model: one class each for training, prefill and decoding."""

from zebra.layers.attention import Attention
from zebra.layers.mamba2 import Mamba2Mixer
from zebra.layers.mla import MAX_STEP_TOKENS, MultiheadLatentAttention
from zebra.layers.mlp import MLP
from zebra.layers.norm import RMSNorm
from zebra.layers.rope import RotaryEmbedding, rope_frequencies

__all__ = [
    "MAX_STEP_TOKENS",
    "MLP",
    "Attention",
    "Mamba2Mixer",
    "MultiheadLatentAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "rope_frequencies",
]
