"""linear_decode, RMSNorm fused into a linear layer of few rows, against eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Case, Inputs, main
from torch import Tensor

from zebra import ops
from zebra.ops import reference


def make(rows: int, N: int, K: int, activation: str, dtype: torch.dtype, device: str) -> Inputs:
    outputs = 2 * N if activation == "swiglu" else N
    return {
        "x": torch.randn(rows, K, dtype=dtype, device=device),
        "weight": (torch.randn(outputs, K, device=device) / K**0.5).to(dtype),
        "norm_weight": torch.ones(K, dtype=dtype, device=device),
        "activation": activation,
    }


def eager(x: Tensor, weight: Tensor, norm_weight: Tensor, activation: str) -> Tensor:
    y = F.linear(F.rms_norm(x, (x.size(-1),), norm_weight, 1e-5), weight)
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y


def cases(device: str) -> list[Case]:
    out = []
    shapes = [(2048, 2048, "none"), (4096, 4096, "none"), (14336, 4096, "swiglu")]
    for N, K, activation in shapes if device == "cuda" else shapes[:2]:
        for rows in (1, 4, 8, 32, 128):
            for dtype in (torch.bfloat16, torch.float32):
                weights = (2 * N if activation == "swiglu" else N) * K

                def truth(i: Inputs) -> list[Tensor]:
                    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in i.items()}
                    return [reference.linear_decode(**wide)]

                out.append(
                    Case(
                        op="linear_decode",
                        shape={"rows": rows, "N": N, "K": K, "activation": activation},
                        dtype=dtype,
                        bytes=(weights + K + rows * (N + K)) * dtype.itemsize,
                        flops=2 * rows * weights,
                        make=lambda d, a=(rows, N, K, activation, dtype): make(*a, d),
                        impls={
                            "zebra": lambda i: [ops.linear_decode(**i)],
                            f"eager torch {torch.__version__}": lambda i: [eager(**i)],
                        },
                        truth=truth,
                        max_error=2e-2 if dtype == torch.bfloat16 else 1e-5,
                    )
                )
    return out


if __name__ == "__main__":
    main(cases, __doc__)
