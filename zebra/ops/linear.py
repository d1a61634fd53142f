"""A linear layer for few rows, with the norm before it and what follows it fused in."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from zebra.ops import reference
from zebra.ops._check import Check, acc_dtype
from zebra.ops._register import autograd, composite, fake


def linear_decode(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    norm_eps: float = 1e-5,
    up_weight: Tensor | None = None,
) -> Tensor:
    """A linear layer of the decode path: input RMSNorm, product, bias, activation, residual.

    Equation:
        h = norm_weight * x / sqrt(mean(x^2) + norm_eps), or x without norm_weight
        y = act(W h + b) + residual;  "swiglu": y = silu(W_gate h + b_gate) * (W_up h + b_up)
            + residual                                          (Shazeer 2020, eq. 6)

    Args:
        x: [..., K] float32, bfloat16 or float16 (float64 on the CPU); meant for at most 128 rows,
            any number works.
        weight: [N, K] like x; for "swiglu" without up_weight [2 N, K], the gate rows before the up
            rows.  Rows may lie further apart than K.
        norm_weight: [K] of x's dtype or float32, or None for no norm.
        bias: [N] ([2 N] for "swiglu", the gate's before the up's) like x, or None.
        residual: [..., N] like x, or None.
        activation: "none" or "swiglu".
        norm_eps: added to the mean square.
        up_weight: [N, K] for "swiglu", where gate and up are two parameters: weight then holds the
            gate rows alone.  Rows lie as far apart as weight's.

    Returns:
        y [..., N] of x's dtype.  Inference only: the result carries no gradient history, also where
        an argument requires grad.

    Raises:
        RuntimeError: on a wrong shape, dtype, device or activation.

    Numerics:
        On the CPU up to 4 rows of bfloat16, 8 of float16 or 16 of other dtypes, everything is in
        fp32 (fp64 for fp64) with one rounding of y, and a row of y does not depend on the other
        rows.  Up to 64 rows of bfloat16 on the matrix unit of a CPU (AMX), h is rounded to bfloat16
        and the products are not.  On Hopper, up to 128 rows of bfloat16 or float16 where zebra's
        kernel is the faster (docs/kernels/linear_decode.md), h is rounded to x's dtype.  In all of
        these sums are fp32 and y is rounded once.  Elsewhere the matrix product is ATen's: h and
        the products are rounded to x's dtype, then y is.  Deterministic.

    In a CUDA graph the kernel reads its weights (weight, up_weight, norm_weight) ahead of the
    kernels launched before it, so nothing in the graph may write them; outside of graphs any order
    is safe.
    """
    with torch.no_grad():
        return torch.ops.zebra.linear_decode(
            x, weight, norm_weight, bias, residual, activation, norm_eps, up_weight
        )


@fake("linear_decode")
def _linear_decode_fake(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    norm_eps: float = 1e-5,
    up_weight: Tensor | None = None,
) -> Tensor:
    stacked = activation == "swiglu" and up_weight is None
    outputs = weight.size(0) // 2 if stacked else weight.size(0)
    return x.new_empty(*x.shape[:-1], outputs)


def _check(
    check: Check,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    up_weight: Tensor | None,
) -> None:
    """csrc/linear_decode/linear_decode_torch.h, up to the residual."""
    known = activation in ("none", "swiglu")
    check.that(known, "activation", f"'{activation}'", "'none' or 'swiglu'")
    swiglu = activation == "swiglu"
    stacked = swiglu and up_weight is None
    check.floating("x", x)
    check.that(x.dim() >= 1 and x.size(-1) > 0, "x", x, "[..., K] with K > 0")
    K, acc = x.size(-1), acc_dtype(x)
    check.like("weight", weight, x, "x")
    check.shape("weight", weight, (-1, K), "[2 N, K]" if stacked else "[N, K]")
    check.last_dim_contiguous("weight", weight)
    ok = not stacked or weight.size(0) % 2 == 0
    check.that(ok, "weight", weight, "[2 N, K]: N gate rows, then N up rows")
    outputs = weight.size(0) // 2 if stacked else weight.size(0)
    if up_weight is not None:
        check.that(swiglu, "up_weight", up_weight, "None unless activation is 'swiglu'")
        check.like("up_weight", up_weight, x, "x")
        check.shape("up_weight", up_weight, (outputs, K), "[N, K]")
        check.last_dim_contiguous("up_weight", up_weight)
        ok = outputs <= 1 or up_weight.stride(0) == weight.stride(0)
        want = ("of rows as far apart as weight's, ", weight.stride(0))
        check.that(ok, "up_weight", up_weight, *want)
    if norm_weight is not None:
        check.shape("norm_weight", norm_weight, (K,), "[K]")
        ok = norm_weight.dtype in (x.dtype, acc)
        check.that(ok, "norm_weight", norm_weight, x.dtype, " like x, or ", acc)
        check.same_device("norm_weight", norm_weight, x)
        check.contiguous("norm_weight", norm_weight)
    if bias is not None:
        check.like("bias", bias, x, "x")
        size, legend = (2 * outputs, "[2 N]") if swiglu else (outputs, "[N]")
        check.shape("bias", bias, (size,), legend)
        check.contiguous("bias", bias)


@composite("linear_decode")
def _linear_decode_composite(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    norm_eps: float = 1e-5,
    up_weight: Tensor | None = None,
) -> Tensor:
    check = Check("linear_decode")
    _check(check, x, weight, norm_weight, bias, activation, up_weight)
    h = x if norm_weight is None else reference.rms_norm(x, norm_weight, eps=norm_eps)[0]
    y = F.linear(h, weight, bias if up_weight is None or bias is None else bias[: weight.size(0)])
    if activation == "swiglu":
        if up_weight is not None:
            up_bias = None if bias is None else bias[weight.size(0) :]
            y = torch.cat((y, F.linear(h, up_weight, up_bias)), dim=-1)
        gate, up = (y if y.dtype == torch.float64 else y.float()).chunk(2, dim=-1)
        y = (F.silu(gate) * up).to(x.dtype)
    if residual is None:
        return y
    check.like("residual", residual, x, "x")
    check.that(residual.shape == y.shape, "residual", residual, "shaped like the result, ", y)
    return y + residual


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_gradient(ctx: Any, dy: Tensor) -> NoReturn:
    raise RuntimeError(
        "zebra::linear_decode: it has no gradient; train with torch.nn.functional.linear"
    )


autograd("linear_decode", _no_gradient, _setup)
