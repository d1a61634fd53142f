"""rms_norm, forward and backward, against eager PyTorch and torch.nn.functional.rms_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Case, Inputs, main

from zebra import ops
from zebra.ops import reference


def make(rows: int, dim: int, dtype: torch.dtype, device: str) -> Inputs:
    x, residual, dy, ds = (torch.randn(rows, dim, dtype=dtype, device=device) for _ in range(4))
    weight = 1 + 0.1 * torch.randn(dim, device=device)
    return {"x": x, "w": weight.to(dtype), "r": residual, "dy": dy, "ds": ds}


def eager(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = x + r
    h = s.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    return h.to(x.dtype) * w, s


def torch_rms_norm(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
    s = x + r
    return F.rms_norm(s, (s.size(-1),), w, 1e-5), s


def gradients(fn):  # forward + backward of fn(x, w, r) -> (y, s)
    def run(i: Inputs) -> list[torch.Tensor]:
        with torch.enable_grad():
            leaves = [i[k].detach().requires_grad_() for k in ("x", "w", "r")]
            out = fn(*leaves)
            dy, ds = (i[k].to(out[0].dtype) for k in ("dy", "ds"))
            return list(torch.autograd.grad(out, leaves, (dy, ds)))

    return run


def cases(device: str) -> list[Case]:
    out = []
    shapes = [(16384, 4096), (16384, 2048), (64, 4096), (1, 4096)]
    for rows, dim in shapes if device == "cuda" else [*shapes[2:], (2048, 2048)]:
        for dtype in (torch.bfloat16, torch.float32):
            size = rows * dim * dtype.itemsize
            common = {
                "shape": {"rows": rows, "D": dim},
                "dtype": dtype,
                "flops": 0,
                "make": lambda d, a=(rows, dim, dtype): make(*a, d),
                "max_error": 1e-2 if dtype == torch.bfloat16 else 1e-5,
            }
            peers = {"eager": eager, f"F.rms_norm torch {torch.__version__}": torch_rms_norm}
            impls = {"zebra": ops.rms_norm} | peers

            def forward(fn):
                return lambda i: fn(i["x"], i["w"], i["r"])

            def wide(i: Inputs) -> Inputs:
                return {k: v.double() for k, v in i.items()}

            out.append(
                Case(
                    op="rms_norm",
                    bytes=4 * size,
                    impls={k: forward(f) for k, f in impls.items()},
                    truth=lambda i: reference.rms_norm(*(i[k].double() for k in ("x", "w", "r"))),
                    **common,
                )
            )
            if rows > 1000:
                out.append(
                    Case(
                        op="rms_norm fwd+bwd",
                        bytes=8 * size,
                        impls={k: gradients(f) for k, f in impls.items()},
                        truth=lambda i: gradients(reference.rms_norm)(wide(i)),
                        **common,
                    )
                )
    return out


if __name__ == "__main__":
    main(cases, __doc__)
