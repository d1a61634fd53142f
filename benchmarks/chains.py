"""Chains of calls in one CUDA graph, as decoding runs them, each call with a weight of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Case, Inputs, Outputs

CHAIN_BYTES = 3 << 29  # of weights in a chain, and at least two of them


def chain_length(weights: int, dtype: torch.dtype) -> int:
    """Calls with so many numbers of weight each, so that weights come from memory."""
    return max(2, min(48, CHAIN_BYTES // (weights * dtype.itemsize)))


def chain_case(
    op: str,
    shape: dict[str, Any],
    dtype: torch.dtype,
    links: int,
    *,
    numbers: int,
    flops: int,
    make: Callable[[str], Inputs],
    zebra: Callable[[Inputs], Outputs],
    eager: Callable[[Inputs], Outputs],
    truth: Callable[[Inputs], Outputs],
) -> Case:
    """A case whose implementations run all links; ``numbers`` and ``flops`` are those of one."""
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        bytes=links * numbers * dtype.itemsize,
        flops=links * flops,
        make=make,
        impls={"zebra": zebra, f"eager torch {torch.__version__}": eager},
        truth=truth,
        max_error=2e-2 if dtype == torch.bfloat16 else 1e-5,
        extra={"chain": links},
    )
