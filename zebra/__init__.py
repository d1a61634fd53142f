"""Zebra: efficient hybrid language models (MLA + Mamba2), from conversion to kernels.

Importing it registers the model with transformers (AutoConfig, AutoModelForCausalLM).
"""

from zebra import ops
from zebra._version import __version__
from zebra.init import convert
from zebra.models import ZebraConfig, ZebraForCausalLM, kv_cache_report

__all__ = [
    "ZebraConfig",
    "ZebraForCausalLM",
    "__version__",
    "convert",
    "kv_cache_report",
    "ops",
]
