"""ssd_scan with gate and per-head norm: forward and forward + backward, against what others run.

The peer where it is installed: mamba-ssm, which needs x and B repeated for every head, as hybrid
models hand them to it, and the gate and norm after it.  Eager is the chunked form in PyTorch
operations, chunks of 64 tokens.
"""

from __future__ import annotations

import torch
from harness import Case, Inputs, main, peer
from torch import Tensor

from zebra import ops
from zebra.ops import reference
from zebra.ops.ssd import _chunked_scan

CHUNK = 64
LEAVES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "norm_weight")
# name: heads, groups of x, B and C, head dimension, state size
LAYERS = {
    "zebra-1b": (32, (8, 8, 32), 64, 64),
    "zebra-8b": (32, (8, 8, 32), 128, 128),
    "mamba2-2.7b": (80, (80, 1, 1), 64, 128),
}


def make(layer: str, batch: int, tokens: int, dtype: torch.dtype, device: str) -> Inputs:
    """Realistic inputs: A in [-16, -1], softplus(dt + dt_bias) around [1e-3, 0.1]."""
    H, (gx, gb, gc), P, N = LAYERS[layer]

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, dtype=dtype, device=device)

    step = torch.empty(H, device=device).uniform_(1e-3, 0.1)
    return {
        "x": randn(gx, P),
        "dt": randn(H) / 2,
        "A": -torch.empty(H, device=device).uniform_(1, 16),
        "B": randn(gb, N),
        "C": randn(gc, N) / N**0.5,
        "D": torch.ones(H, device=device),
        "z": randn(H, P),
        "dt_bias": step.expm1().log(),
        "norm_weight": torch.ones(H * P, dtype=dtype, device=device),
        "dy": randn(H, P),
    }


def zebra(**i: Tensor) -> Tensor:
    return ops.ssd_scan(**i)[0]


def eager(**i: Tensor) -> Tensor:
    return _chunked_scan(
        **i, initial_state=None, cu_seqlens=None, dt_softplus=True, norm_eps=1e-5, chunk=CHUNK
    )[0]


def mamba_ssm(**i: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    H = i["A"].size(0)
    groups = max(i["B"].size(2), i["C"].size(2))  # one number of groups for B and C
    x = i["x"].repeat_interleave(H // i["x"].size(2), dim=2)
    B, C = (i[k].repeat_interleave(groups // i[k].size(2), dim=2) for k in ("B", "C"))
    y = mamba_chunk_scan_combined(
        x, i["dt"], i["A"], B, C, 256, D=i["D"], dt_bias=i["dt_bias"], dt_softplus=True
    )
    return reference.gated_norm(y, i["z"], i["norm_weight"], 1e-5).to(x.dtype)


def forward(fn):
    return lambda i: [fn(**{k: i[k] for k in LEAVES})]


def gradients(fn):
    def run(i: Inputs) -> list[Tensor]:
        with torch.enable_grad():
            leaves = {k: i[k].detach().requires_grad_() for k in LEAVES}
            y = fn(**leaves)
            return list(torch.autograd.grad(y, list(leaves.values()), i["dy"].to(y.dtype)))

    return run


def exact(fn):
    """The truth: eager in fp64; on a GPU in fp32, because fp64 does not fit at those sizes."""
    run = fn(eager)

    def truth(i: Inputs) -> list[Tensor]:
        wide = torch.float32 if i["x"].is_cuda else torch.float64
        return run({k: v.to(wide) for k, v in i.items()})

    return truth


def cases(device: str) -> list[Case]:
    """Model shapes: a long batch on a GPU, one sequence on the CPU."""
    shapes = [(8, 2048), (1, 16384)] if device == "cuda" else [(1, 2048)]
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.bfloat16, torch.float32)
    impls = {"zebra": zebra, "eager": eager}
    library = peer("mamba_ssm", "mamba-ssm") if device == "cuda" else None
    if library:
        impls[library] = mamba_ssm
    out = []
    for layer, (H, groups, P, N) in LAYERS.items():
        for batch, tokens in shapes:
            for dtype in dtypes:
                bc = groups[0] * P + (groups[1] + groups[2]) * N + H  # x, B, C, dt
                per_token = (bc + 2 * H * P) * dtype.itemsize  # and z, y
                state = 4 * batch * H * P * N
                pairs = H * (2 * CHUNK * (N + P) + 4 * N * P)  # flops of a token
                common = {
                    "shape": {"layer": layer, "B": batch, "T": tokens},
                    "dtype": dtype,
                    "make": lambda d, a=(layer, batch, tokens, dtype): make(*a, d),
                    "max_error": 1e-2 if dtype == torch.bfloat16 else 1e-4,
                }
                out.append(
                    Case(
                        op="ssd_scan",
                        bytes=batch * tokens * per_token + state,
                        flops=batch * tokens * pairs,
                        impls={k: forward(f) for k, f in impls.items()},
                        truth=exact(forward),
                        **common,
                    )
                )
                # Backward reads the inputs and dy and writes the gradients of the inputs.
                both = 3 * bc + 5 * H * P
                out.append(
                    Case(
                        op="ssd_scan fwd+bwd",
                        bytes=batch * tokens * both * dtype.itemsize + state,
                        flops=batch * tokens * H * (8 * CHUNK * N + 6 * CHUNK * P + 14 * N * P),
                        impls={k: gradients(f) for k, f in impls.items()},
                        truth=exact(gradients),
                        **common,
                    )
                )
    return out


if __name__ == "__main__":
    main(cases, __doc__)
