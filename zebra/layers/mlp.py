"""The gated feed-forward block of Llama."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from zebra import ops
from zebra.layers.linear import decode_linear, is_plain, is_untouched
from zebra.layers.norm import RMSNorm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class MLP(nn.Module):
    """y = W_down (act(W_gate x) * W_up x), no biases.

    Args:
        hidden_size: Width of x and y.
        intermediate_size: Width between the projections.
        activation: "silu", "gelu" or "gelu_pytorch_tanh".

    Raises:
        ValueError: If the activation is unknown.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"MLP: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}"
            )
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., hidden_size] to the same shape."""
        down: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return down

    def step(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """hidden + MLP(norm(hidden)) for the few rows of a decoding step.

        Args:
            hidden: [..., hidden_size].
            norm: Of the rows of hidden.

        Returns:
            The same shape.
        """
        fused = (
            self.activation is F.silu
            and is_untouched(self, MLP)
            and is_untouched(norm, RMSNorm)
            and is_plain(hidden, self.gate_proj, self.up_proj)
        )
        if not fused:
            return hidden + self(norm(hidden))
        inner = ops.linear_decode(
            hidden,
            self.gate_proj.weight,
            norm.weight,
            activation="swiglu",
            norm_eps=norm.eps,
            up_weight=self.up_proj.weight,
        )
        return decode_linear(self.down_proj, inner, residual=hidden)
