"""Linear layers of a decoding step: few rows, at the speed at which memory gives the weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from zebra import ops
from zebra.layers.norm import RMSNorm

MAX_DECODE_ROWS = 128  # of ops.linear_decode's kernels; nn.Linear multiplies more rows


def decode_linear(
    linear: nn.Module, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None
) -> Tensor:
    """linear(norm(x)) + residual for inference, by one operator where nobody altered the layer.

    Args:
        linear: nn.Linear, or what took its place: an adapter, a quantised or a hooked layer is
            called, as is any on the CPU or under autocast.
        x: [..., K].
        norm: Of the rows of x.
        residual: [..., N], added to the result.

    Returns:
        [..., N], without gradient history where the operator was used.
    """
    if is_plain(x, linear) and (norm is None or is_untouched(norm, RMSNorm)):
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        plain = cast(nn.Linear, linear)
        return ops.linear_decode(x, plain.weight, weight, plain.bias, residual, norm_eps=eps)
    y = cast(Tensor, linear(x if norm is None else norm(x)))
    return y if residual is None else residual + y


def is_plain(x: Tensor, *linear: nn.Module) -> bool:
    """Whether ops.linear_decode may take x and the weights of these layers, and is the faster."""
    return (
        is_inference(x)
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() <= MAX_DECODE_ROWS * x.size(-1)
        and all(is_untouched(m, nn.Linear) and _is_like(m, x) for m in linear)
    )


def is_inference(x: Tensor) -> bool:
    """Whether nothing that only calling the layers would do is asked for: gradients, autocast."""
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    return not needs_grad and not torch.is_autocast_enabled(x.device.type)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module would run ``kind.forward`` and nothing else."""
    return (
        type(module) is kind
        and "forward" not in vars(module)  # patched, as accelerate does to offload weights
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def require_plain(linear: nn.Module, name: str) -> None:
    """Raise ValueError, naming the layer, where its weight does not say all that it does."""
    if not is_untouched(linear, nn.Linear):
        raise ValueError(
            f"{name} must be a plain nn.Linear, got {type(linear).__name__}, or one with hooks; "
            "merge adapters into it first"
        )


def _is_like(module: nn.Module, x: Tensor) -> bool:
    weight = cast(nn.Linear, module).weight
    return weight.dtype == x.dtype and weight.device == x.device
