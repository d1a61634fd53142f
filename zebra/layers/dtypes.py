"""Dtypes of operator arguments: autocast, which does not reach inside operators, and fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Any) -> Any:
    """Return the tensors (or None) as a matmul under the current autocast would take them."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def wide(t: Tensor) -> Tensor:
    """Return t in the dtype operators accumulate in: fp64 stays fp64, all else becomes fp32."""
    return t if t.dtype == torch.float64 else t.float()
