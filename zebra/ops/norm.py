"""RMSNorm with an optional fused residual addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zebra.ops import reference
from zebra.ops._check import Check, acc_dtype
from zebra.ops._register import autograd, composite, fake


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation, with the residual addition before it where given.

    Equation:
        s = x + residual;  y = weight * s / sqrt(mean(s^2) + eps)   (Zhang and Sennrich 2019, eq. 4)

    Args:
        x: [..., D] float32, bfloat16 or float16 (float64 on the CPU); rows may be views.
        weight: [D] of x's dtype or float32, contiguous.
        residual: like x, or None.
        eps: added to the mean square.

    Returns:
        y like x; with a residual, the pair (y, s).

    Raises:
        RuntimeError: on a wrong shape, dtype or device.

    Numerics:
        Sums and products in fp32 (fp64 for fp64); one rounding to the output dtype.  Deterministic,
        the weight gradient included.
    """
    y, s, _ = torch.ops.zebra.rms_norm(x, weight, residual, eps)
    return y if residual is None else (y, s)


@fake("rms_norm")
def _rms_norm_fake(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    s = x.new_empty(0 if residual is None else x.shape)
    return y, s, x.new_empty(x.numel() // x.size(-1), dtype=acc_dtype(x))


@fake("rms_norm_backward")
def _rms_norm_backward_fake(
    dy: Tensor, dsum: Tensor | None, sum: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return sum.new_empty(sum.shape), weight.new_empty(weight.shape)


@composite("rms_norm")
def _rms_norm_composite(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    check = Check("rms_norm")
    check.that(x.dim() >= 1, "x", x, "at least 1-D, [..., D]")
    check.floating("x", x)
    check.that(x.size(-1) > 0, "x", x, "non-empty in its last dimension")
    check.shape("weight", weight, (x.size(-1),), "[D]")
    check.parameter("weight", weight, x)
    if residual is not None:
        check.like("residual", residual, x, "x")
        check.that(residual.shape == x.shape, "residual", residual, "shaped like x, ", x)
    y, s = reference.rms_norm(x, weight, residual, eps)
    wide = x.float() if residual is None else x.float() + residual.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps).flatten()
    return y, x.new_empty(0) if residual is None else s, rstd


@composite("rms_norm_backward")
def _rms_norm_backward_composite(
    dy: Tensor, dsum: Tensor | None, sum: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    g, s, r = dy.float(), sum.float(), rstd.view(*sum.shape[:-1], 1)
    dw = (g * s * r).flatten(0, -2).sum(0)
    g = g * weight.float()
    dx = r * (g - s * r.square() * (g * s).mean(-1, keepdim=True))
    return (dx if dsum is None else dx + dsum.float()).to(sum.dtype), dw.to(weight.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, _ = inputs
    _, s, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else s, weight, rstd)


def _backward(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, _drstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    s, weight, rstd = ctx.saved_tensors
    if dy is None:  # only the sum was used
        return dsum, None, dsum, None
    dsum = dsum if ctx.has_residual else None
    dx, dweight = torch.ops.zebra.rms_norm_backward(dy, dsum, s, weight, rstd)
    return dx, dweight, dx if ctx.has_residual else None, None


autograd("rms_norm", _backward, _setup)
