"""mamba2_step: one decoding step of a Mamba2 mixer, against the same maths in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Case, Inputs, main
from torch import Tensor

from zebra import ops
from zebra.ops import reference

WIDTH, GROUPS = 4, 8
PEERS = ("zebra", f"eager torch {torch.__version__}")


def make(
    batch: int, heads: int, headdim: int, dtype: torch.dtype, state_dtype: torch.dtype, device: str
) -> Inputs:
    """Parameters, one row a sequence, and states of its own for every implementation."""
    channels = 2 * GROUPS * headdim + heads * headdim

    def rand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    conv, ssm = rand(batch, channels, WIDTH - 1), rand(batch, heads, headdim, headdim)
    return {
        "zxbcdt": rand(batch, heads * headdim + channels + heads),
        "states": {
            name: (conv.clone(), ssm.to(state_dtype, copy=True)) for name in (*PEERS, "truth")
        },
        "rest": (
            rand(channels, WIDTH) / 2,
            rand(channels),
            rand(heads) - 3,
            -torch.empty(heads, device=device).uniform_(1, 16),
            rand(heads),
            1 + 0.1 * rand(heads * headdim),
            GROUPS,
        ),
    }


def eager(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    n_groups: int,
) -> Tensor:
    batch, H, P, N = ssm_state.shape
    z, xbc, dt = zxbcdt.split([H * P, n_groups * (P + N) + H * N, H], dim=-1)
    window = torch.cat((conv_state, xbc[:, :, None]), dim=-1)
    conv_state.copy_(window[:, :, 1:])
    conv = F.silu((window * conv_weight).sum(-1) + conv_bias).float()
    x, Bt, Ct = conv.split([n_groups * P, n_groups * N, H * N], dim=-1)
    x = x.view(batch, n_groups, P).repeat_interleave(H // n_groups, 1)
    Bt = Bt.view(batch, n_groups, N).repeat_interleave(H // n_groups, 1)
    d = F.softplus(dt.float() + dt_bias.float())
    decay, update = torch.exp(d * A)[:, :, None, None], (d[..., None] * x)[..., None]
    if ssm_state.dtype == torch.float32:
        state = ssm_state.mul_(decay).add_(update * Bt[:, :, None])
    else:
        state = ssm_state.float() * decay + update * Bt[:, :, None]
        ssm_state.copy_(state)
    y = torch.einsum("bhpn,bhn->bhp", state, Ct.view(batch, H, N)) + D.float()[:, None] * x
    u = y * F.silu(z.float()).view(batch, H, P)
    u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-5)
    return (u.flatten(1) * norm_weight.float()).to(zxbcdt.dtype)


def cases(device: str) -> list[Case]:
    out = []
    models = {"1b": (32, 64), "3b": (24, 128), "8b": (32, 128)}
    if device == "cpu":
        models.pop("3b")
    for model, (H, P) in models.items():
        for batch in (1, 16, 64, 256) if device == "cuda" else (1, 4, 16):
            for state_dtype in (torch.float32, torch.bfloat16):
                dtype = torch.bfloat16
                channels = 2 * GROUPS * P + H * P
                row = 2 * H * P + channels + H + 2 * channels * (WIDTH - 1)
                weights = channels * (WIDTH + 1) + 2 * H + H * P

                def step(name, fn):
                    return lambda i: [fn(i["zxbcdt"], *i["states"][name], *i["rest"])]

                def truth(i: Inputs) -> list[Tensor]:
                    args = (i["zxbcdt"], *i["states"]["truth"], *i["rest"])
                    wide = (a.double() if isinstance(a, Tensor) else a for a in args)
                    return [reference.mamba2_step(*wide)[0]]

                fns = zip(PEERS, (ops.mamba2_step, eager), strict=True)
                out.append(
                    Case(
                        op="mamba2_step",
                        shape={"model": model, "batch": batch, "state": str(state_dtype)[6:]},
                        dtype=dtype,
                        bytes=2 * batch * H * P * P * state_dtype.itemsize
                        + (batch * row + weights) * dtype.itemsize,
                        flops=0,
                        make=lambda d, a=(batch, H, P, dtype, state_dtype): make(*a, d),
                        impls={name: step(name, fn) for name, fn in fns},
                        truth=truth,
                        max_error=1e-2,
                    )
                )
    return out


if __name__ == "__main__":
    main(cases, __doc__)
