"""Start a hybrid from a Transformer: pure functions on weights, and ``convert`` around them."""

from zebra.init.convert import convert, spread_layer_types
from zebra.init.mamba2 import gqa_to_mamba2
from zebra.init.svd import gqa_to_mla, rank_for_energy

__all__ = ["convert", "gqa_to_mamba2", "gqa_to_mla", "rank_for_energy", "spread_layer_types"]
