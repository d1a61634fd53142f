"""fused_kl_div, forward and backward, against logits of all tokens in eager PyTorch.

The eager peer at 16 bits rounds the logits to 16 bits; ``error`` shows what that costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Case, Inputs, main
from torch import Tensor

from zebra import ops
from zebra.ops import reference

NAMES = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")


def make(M: int, V: int, D: int, dtype: torch.dtype, device: str) -> Inputs:
    """Logits of deviation 2; the teacher is the student and a perturbation."""
    hidden = torch.randn(M, D, device=device)
    weight = 2 * torch.randn(V, D, device=device) / D**0.5
    other = hidden + 0.3 * torch.randn_like(hidden)
    tensors = (hidden, weight, other, weight)
    return {k: t.to(dtype) for k, t in zip(NAMES, tensors, strict=True)}


def eager(sh: Tensor, sw: Tensor, th: Tensor, tw: Tensor) -> Tensor:
    student = F.log_softmax(F.linear(sh, sw).float(), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(th, tw).float(), dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def gradients(fn: Callable[..., Tensor]) -> Callable[[Inputs], list[Tensor]]:
    def run(i: Inputs) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [i[k].detach().requires_grad_() for k in NAMES[:2]]
            kl = fn(*leaves, i[NAMES[2]], i[NAMES[3]])
            return [kl, *torch.autograd.grad(kl.sum(), leaves)]

    return run


def cases(device: str) -> list[Case]:
    out = []
    shapes = [(8192, 128256, 2048), (2048, 128256, 4096), (2048, 32000, 4096)]
    for M, V, D in shapes if device == "cuda" else [(128, 32000, 512)]:
        for dtype in (torch.bfloat16, torch.float32):
            impls = {"zebra": ops.fused_kl_div, f"eager torch {torch.__version__}": eager}
            # fp64 logits of all tokens where they fit, else the operator's own chunks in fp32.
            small = M * V < 1 << 25

            def wide(i: Inputs, small=small) -> Inputs:
                return {k: v.double() if small else v.float() for k, v in i.items()}

            exact = reference.fused_kl_div if small else ops.fused_kl_div
            size = 2 * (M + V) * D * dtype.itemsize
            common = {
                "shape": {"M": M, "V": V, "D": D},
                "dtype": dtype,
                "make": lambda d, a=(M, V, D, dtype): make(*a, d),
                "max_error": 5e-2 if dtype == torch.bfloat16 else 1e-4,
            }
            out.append(
                Case(
                    op="fused_kl_div",
                    bytes=size,
                    flops=4 * M * V * D,
                    impls={k: lambda i, f=f: [f(*i.values())] for k, f in impls.items()},
                    truth=lambda i, f=exact, w=wide: [f(*w(i).values())],
                    **common,
                )
            )
            out.append(
                Case(
                    op="fused_kl_div fwd+bwd",
                    bytes=size + (M + V) * D * dtype.itemsize,
                    flops=8 * M * V * D,
                    impls={k: gradients(f) for k, f in impls.items()},
                    truth=lambda i, f=exact, w=wide: gradients(f)(w(i)),
                    **common,
                )
            )
    return out


if __name__ == "__main__":
    main(cases, __doc__)
