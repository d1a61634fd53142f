"""Autocast for operators that take weights: PyTorch's autocast does not reach inside them."""

from __future__ import annotations

from typing import Any

import torch


def autocast(*tensors: Any) -> Any:
    """Return the tensors (or None) as a matmul under the current autocast would take them."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in tensors)
