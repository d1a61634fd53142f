"""causal_conv1d: forward, forward + backward and one decoding step, against what others run.

Peers where they are installed: causal-conv1d and flash-linear-attention.  Eager is
torch.nn.functional.conv1d on the transposed tensor, as models write it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Case, Inputs, main, peer
from torch import Tensor

from zebra import ops
from zebra.ops import reference

WIDTH = 4


def make(batch: int, tokens: int, channels: int, dtype: torch.dtype, device: str) -> Inputs:
    x, dy = (torch.randn(batch, tokens, channels, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(channels, WIDTH, device=device) / 2
    bias = torch.randn(channels, device=device) / 2
    return {"x": x, "dy": dy, "w": weight.to(dtype), "b": bias.to(dtype)}


def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.conv1d(F.pad(x.transpose(1, 2), (WIDTH - 1, 0)), w[:, None], b, groups=w.size(0))
    return F.silu(y).transpose(1, 2)


def zebra(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ops.causal_conv1d(x, w, b)[0]


def exact(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The truth in fp32, which fits at these sizes: all channels of a token at once."""
    full = F.pad(x.float(), (0, 0, WIDTH - 1, 0))
    taps = (full[:, k : k + x.size(1)] * w.float()[:, k] for k in range(WIDTH))
    return F.silu(sum(taps) + b.float())


def gradients(fn):
    def run(i: Inputs) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [i[k].detach().requires_grad_() for k in ("x", "w", "b")]
            y = fn(*leaves)
            return list(torch.autograd.grad(y, leaves, i["dy"].to(y.dtype)))

    return run


def peers() -> dict:
    found = {}
    library = peer("causal_conv1d", "causal-conv1d")
    if library:

        def dao(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            from causal_conv1d import causal_conv1d_fn

            return causal_conv1d_fn(x.transpose(1, 2), w, b, activation="silu").transpose(1, 2)

        found[library] = dao
    library = peer("fla", "flash-linear-attention")
    if library:

        def fla(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            from fla.modules.convolution import causal_conv1d

            return causal_conv1d(x, w, b, activation="silu")[0]

        found[library] = fla
    return found


def step_case(rows: int, channels: int) -> Case:
    dtype = torch.bfloat16

    def make_step(device: str) -> Inputs:
        i = make(rows, 1, channels, dtype, device)
        state = torch.randn(rows, channels, WIDTH - 1, dtype=dtype, device=device)
        return i | {"x": i["x"][:, 0], "state": state, "scratch": state.clone()}

    def eager_step(i: Inputs) -> list[Tensor]:
        full = torch.cat((i["state"], i["x"][..., None]), dim=-1)
        return [F.silu((full * i["w"]).sum(-1) + i["b"]), full[..., 1:].contiguous()]

    def zebra_step(i: Inputs) -> list[Tensor]:  # mutates a scratch copy: the shift is the same work
        return [ops.causal_conv1d_step(i["x"], i["scratch"], i["w"], i["b"])]

    def gate(i: Inputs) -> list[Tensor]:
        i["scratch"].copy_(i["state"])
        args = (i[k].double() for k in ("x", "state", "w", "b"))
        return [reference.causal_conv1d_step(*args)[0]]

    return Case(
        op="causal_conv1d_step",
        shape={"B": rows, "C": channels},
        dtype=dtype,
        bytes=2 * rows * channels * (2 + 2 * (WIDTH - 1)),
        flops=0,
        make=make_step,
        impls={"zebra": zebra_step, "eager": lambda i: eager_step(i)[:1]},
        truth=gate,
        max_error=1e-2,
    )


def cases(device: str) -> list[Case]:
    out = []
    shapes = [(2, 8192, 6144), (2, 8192, 5120), (2, 8192, 3072), (8, 2048, 6144), (1, 32768, 6144)]
    for batch, tokens, channels in shapes if device == "cuda" else [(1, 2048, 3072)]:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.bfloat16, torch.float32):
            size = batch * tokens * channels * dtype.itemsize
            common = {
                "shape": {"B": batch, "T": tokens, "C": channels},
                "dtype": dtype,
                "flops": 0,
                "make": lambda d, a=(batch, tokens, channels, dtype): make(*a, d),
                "max_error": 1e-2 if dtype == torch.bfloat16 else 1e-5,
            }
            out.append(
                Case(
                    op="causal_conv1d",
                    bytes=2 * size,
                    impls={
                        k: lambda i, f=f: [f(i["x"], i["w"], i["b"])]
                        for k, f in {"zebra": zebra, "eager": eager, **peers()}.items()
                    },
                    truth=lambda i: [exact(i["x"], i["w"], i["b"])],
                    **common,
                )
            )
            out.append(
                Case(
                    op="causal_conv1d fwd+bwd",
                    bytes=5 * size,
                    impls={
                        k: gradients(f)
                        for k, f in {"zebra": zebra, "eager": eager, **peers()}.items()
                    },
                    truth=lambda i: gradients(exact)({k: v.float() for k, v in i.items()}),
                    **common,
                )
            )
    steps = [step_case(rows, 6144) for rows in ((1, 16, 64, 256) if device == "cuda" else (1, 64))]
    return out + steps


if __name__ == "__main__":
    main(cases, __doc__)
