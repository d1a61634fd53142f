"""Zebra: efficient hybrid language models (MLA + Mamba2), from conversion to kernels."""

from zebra import ops
from zebra._version import __version__

__all__ = ["__version__", "ops"]
