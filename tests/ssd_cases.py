"""Inputs of ssd_scan and the comparisons that its test files share."""

from typing import Any

import tolerances
import torch
from torch import Tensor

from zebra import ops
from zebra.ops import reference
from zebra.testing import assert_close, relative_error

NAMES = ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "norm_weight", "initial_state"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    batch=2,
    tokens=70,
    H=4,
    P=8,
    N=8,
    groups=(2, 2, 4),
    dtype=torch.float32,
    device="cpu",
    cu=None,
    without=(),
    small=torch.float32,
) -> dict[str, Any]:
    """Realistic inputs: A in [-16, -1], softplus(dt + dt_bias) around [1e-3, 0.1].

    ``small`` is the dtype of D, dt_bias and norm_weight; ``without`` names absent arguments.  On
    CUDA in 16 bit, P and N become the next sizes that its kernels take.
    """
    if device == "cuda" and dtype.itemsize == 2:
        P, N = (64 if size <= 64 else 128 for size in (P, N))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    sequences = batch if cu is None else len(cu) - 1

    def randn(*shape, to=dtype):
        return torch.randn(shape, dtype=torch.float64).to(to)

    small = acc if small == torch.float32 else small
    step = torch.empty(H, dtype=torch.float64).uniform_(1e-3, 0.1)
    args = dict(
        x=randn(batch, tokens, groups[0], P),
        dt=0.5 * randn(batch, tokens, H),
        A=-torch.empty(H, dtype=acc).uniform_(1, 16),
        B=randn(batch, tokens, groups[1], N),
        C=randn(batch, tokens, groups[2], N) / N**0.5,
        D=1 + 0.1 * randn(H, to=small),
        z=randn(batch, tokens, H, P),
        dt_bias=step.expm1().log().to(small),
        norm_weight=1 + 0.1 * randn(H * P, to=small),
        initial_state=randn(sequences, H, P, N, to=acc),
        cu_seqlens=None if cu is None else torch.tensor(cu, dtype=torch.int32),
    )
    args = {k: None if v is None or k in without else v.to(device) for k, v in args.items()}
    if args["z"] is None:
        args["norm_weight"] = None
    return args


def doubles(args: dict[str, Any]) -> dict[str, Any]:
    def wide(v):
        if not isinstance(v, Tensor):
            return v
        return v.detach().cpu() if v.dtype == torch.int32 else v.detach().double().cpu()

    return {k: wide(v) for k, v in args.items()}


def check(args: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Compare ops.ssd_scan with the truth; return its outputs."""
    y, state = got = ops.ssd_scan(**args, **options)
    truth = reference.ssd_scan(**doubles(args), **options)
    eager = reference.ssd_scan(**args, **options)
    if y.is_cuda and y.dtype.itemsize == 2:
        factor = tolerances.factor("ssd_scan.matrix_units", y.dtype)
        assert_close(y, truth[0], eager[0], factor, "y")
        assert relative_error(state, truth[1]) <= tolerances.SSD_STATE_ERROR[y.dtype]
        return got
    for name, g, t, e in zip(("y", "final_state"), got, truth, eager, strict=True):
        assert_close(g, t, e, tolerances.factor("ssd_scan", g.dtype), name)
    return got


def gradients(fn, args, dy, dstate) -> dict[str, Tensor]:
    """Gradients of (y, final_state) . (dy, dstate) by argument; either may be None."""
    leaves = {k: args[k].detach().clone().requires_grad_() for k in NAMES if args[k] is not None}
    outputs = zip(fn(**{**args, **leaves}), (dy, dstate), strict=True)
    outputs = [(o, g) for o, g in outputs if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in outputs], list(leaves.values()), [g for _, g in outputs]
    )
    return dict(zip(leaves, grads, strict=True))
