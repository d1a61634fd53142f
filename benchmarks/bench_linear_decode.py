"""linear_decode against eager PyTorch: on a GPU every projection of decoding, in chains.

A GPU case is a chain of calls in one CUDA graph, as decoding runs them, each with a weight of its
own, so that weights come from memory; times are those of the chain.  "plain" is the product alone,
and the peer there is F.linear (cuBLAS); "fused" is what the model asks for: the norm before it, the
activation or the residual after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from chains import chain_case, chain_length
from harness import Case, Inputs, main
from torch import Tensor

from zebra import ops
from zebra.ops import reference


class Projection(NamedTuple):
    """A weight [N, K] ([2 N, K] for "swiglu") and what surrounds it."""

    name: str
    N: int
    K: int
    norm: bool = False
    residual: bool = False
    activation: str = "none"

    @property
    def weights(self) -> int:
        return (2 * self.N if self.activation == "swiglu" else self.N) * self.K


def projections(size: str) -> list[Projection]:
    """The projections of a decoding step of the models of this size."""
    hidden, inner, heads, head_dim, latent = {
        "1b": (2048, 8192, 32, 64, 160),
        "3b": (3072, 8192, 24, 128, 192),
        "8b": (4096, 14336, 32, 128, 224),
    }[size]
    kv = 8 * head_dim
    return [
        Projection(f"{size} in_proj", 2 * hidden + 2 * kv + heads, hidden, norm=True),
        Projection(f"{size} out_proj, o_proj", hidden, hidden, residual=True),
        Projection(f"{size} q and kv_a", hidden + latent, hidden, norm=True),
        Projection(f"{size} gate, up", inner, hidden, norm=True, activation="swiglu"),
        Projection(f"{size} down", hidden, inner, residual=True),
        Projection(f"{size} lm_head", 128256, hidden, norm=True),
    ]


def make(p: Projection, rows: int, links: int, dtype: torch.dtype, device: str) -> Inputs:
    shape = (links, p.weights // p.K, p.K)
    optional = {
        "norm_weight": torch.ones(p.K, dtype=dtype, device=device) if p.norm else None,
        "residual": torch.randn(rows, p.N, dtype=dtype, device=device) if p.residual else None,
    }
    return {
        "x": torch.randn(rows, p.K, dtype=dtype, device=device),
        "weight": torch.randn(shape, dtype=dtype, device=device).mul_(p.K**-0.5),
        "activation": p.activation,
    } | {name: value for name, value in optional.items() if value is not None}


def eager(
    x: Tensor,
    weight: Tensor,
    activation: str,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    if norm_weight is not None:
        x = F.rms_norm(x, (x.size(-1),), norm_weight, 1e-5)
    y = F.linear(x, weight)
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def links(i: Inputs) -> list[Inputs]:
    return [i | {"weight": w} for w in i["weight"]]


def last_of_all(call: Callable[..., Tensor]) -> Callable[[Inputs], list[Tensor]]:
    """All links, one result alive at a time, as in decoding: together they would fill L2."""

    def run(i: Inputs) -> list[Tensor]:
        for link in links(i):
            y = call(**link)
        return [y]

    return run


def case(p: Projection, rows: int, count: int, dtype: torch.dtype, form: str) -> Case:
    """A chain of `count` calls; only the last result is kept."""

    def truth(i: Inputs) -> list[Tensor]:
        last = links(i)[-1]
        wide: Inputs = {k: v.double() if isinstance(v, Tensor) else v for k, v in last.items()}
        return [reference.linear_decode(**wide)]

    other = rows * (p.N * (2 if p.residual else 1) + p.K) + (p.K if p.norm else 0)
    return chain_case(
        "linear_decode",
        {"projection": p.name, "form": form, "rows": rows, "N": p.N, "K": p.K}
        | ({"activation": p.activation} if p.activation != "none" else {}),
        dtype,
        count,
        numbers=p.weights + other,
        flops=2 * rows * p.weights,
        make=lambda device: make(p, rows, count, dtype, device),
        zebra=last_of_all(ops.linear_decode),
        eager=last_of_all(eager),
        truth=truth,
    )


def cases(device: str) -> list[Case]:
    if device == "cpu":
        some = [Projection("square", D, D, norm=True) for D in (2048, 4096)]
        dtypes = (torch.bfloat16, torch.float32)
        return [case(p, m, 1, d, "fused") for p in some for m in (1, 4, 8, 32, 128) for d in dtypes]
    out = []
    for size in ("1b", "3b", "8b"):
        for p in projections(size):
            count = chain_length(p.weights, torch.bfloat16)
            plain = Projection(p.name, p.weights // p.K, p.K)
            for rows in (1, 16, 32, 64, 128):
                out.append(case(plain, rows, count, torch.bfloat16, "plain"))
                out.append(case(p, rows, count, torch.bfloat16, "fused"))
    return out


if __name__ == "__main__":
    main(cases, __doc__)
