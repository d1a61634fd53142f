"""RMSNorm as a module."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from zebra import ops


class RMSNorm(nn.Module):
    """y = weight * s / sqrt(mean(s^2) + eps), s = x + residual.

    Args:
        dim: Width of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]."""
        return cast(Tensor, ops.rms_norm(x, self.weight, eps=self.eps))

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the sum itself, from one pass over memory."""
        pair = ops.rms_norm(x, self.weight, residual, self.eps)
        return cast("tuple[Tensor, Tensor]", pair)

    def extra_repr(self) -> str:
        """Describe the norm in ``print(model)``."""
        return f"{self.weight.numel()}, eps={self.eps}"
