"""mla_project_append against eager PyTorch: what a decoding step does before latent attention.

A call is the input norm, q and [c | k_rope] with merged query weights, the rotation and the rows of
the paged cache.  On a GPU a case is a chain of calls in one CUDA graph, each with weights of its
own, as decoding runs them.  The peer is eager PyTorch with both weights in one F.linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench_prefill import MLA
from chains import chain_case, chain_length
from harness import Case, Inputs, main
from torch import Tensor

from zebra import ops
from zebra.ops import reference

PAGE = 64


def make(model: str, batch: int, links: int, dtype: torch.dtype, device: str) -> Inputs:
    D, H, _, R, Dn, E, *_ = MLA[model]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    angles = torch.rand(8192, E // 2, device=device)
    slots = torch.arange(batch, device=device)[:, None] * 3 % (batch * PAGE)
    return {
        "hidden": randn(batch, 1, D),
        "norm_weight": torch.ones(D, dtype=dtype, device=device),
        "weight": randn(links, H * (Dn + E) + R + E, D) * D**-0.5,  # q's rows, then kv_a's
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.full((batch, 1), 8191, device=device),
        "cache": randn(batch, PAGE, R + E),
        "slot_mapping": slots,
    }


def eager(i: Inputs, weight: Tensor, heads: int, latent: int) -> list[Tensor]:
    x = F.rms_norm(i["hidden"], (i["hidden"].size(-1),), i["norm_weight"], 1e-5)
    q, kv = F.linear(x, weight).split([weight.size(0) - latent, latent], dim=-1)
    E = 2 * i["cos"].size(-1)
    cos, sin = i["cos"][i["positions"]], i["sin"][i["positions"]]
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([q.size(-1) // heads - E, E], dim=-1)
    q = torch.cat((q_nope, turned(q_rope, cos[:, :, None], sin[:, :, None])), dim=-1)
    row = torch.cat((kv[..., :-E], turned(kv[..., -E:], cos, sin)), dim=-1)
    i["cache"].view(-1, latent)[i["slot_mapping"].flatten()] = row.flatten(0, 1)
    return [q, row]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rotate(x.float(), cos, sin).to(x.dtype)


def case(model: str, batch: int, dtype: torch.dtype, gpu: bool) -> Case:
    """A chain of calls; only the last result is kept, and compared with its cache row."""
    D, H, _, R, Dn, E, *_ = MLA[model]
    rows, latent = H * (Dn + E) + R + E, R + E
    count = chain_length(rows * D, dtype) if gpu else 1

    def zebra(i: Inputs) -> list[Tensor]:
        out: tuple[Tensor, Tensor] = ()
        for w in i["weight"]:
            out = ops.mla_project_append(
                i["hidden"], None, w[:-latent], w[-latent:], i["cos"], i["sin"], i["positions"], H,
                i["cache"], i["slot_mapping"],
                input_norm_weight=i["norm_weight"], input_norm_eps=1e-5,
            )  # fmt: skip
        stored = i["cache"].view(-1, latent)[i["slot_mapping"].flatten()]
        return [*out, stored.view_as(out[1])]

    def peer(i: Inputs) -> list[Tensor]:
        for w in i["weight"]:
            q, row = eager(i, w, H, latent)
        return [q, row, row]

    def truth(i: Inputs) -> list[Tensor]:
        x = reference.rms_norm(i["hidden"].double(), i["norm_weight"].double(), eps=1e-5)[0]
        w = i["weight"][-1].double()
        q, row = reference.mla_project(
            x, None, w[:-latent], w[-latent:], i["cos"], i["sin"], i["positions"], H
        )
        return [q, row, row]

    return chain_case(
        "mla_project_append",
        {"model": model, "B": batch, "N": rows, "K": D},
        dtype,
        count,
        numbers=rows * D + batch * (D + rows + latent),
        flops=2 * batch * rows * D,
        make=lambda device: make(model, batch, count, dtype, device),
        zebra=zebra,
        eager=peer,
        truth=truth,
    )


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [case("1b", b, d, False) for b in (1, 8) for d in (torch.bfloat16, torch.float32)]
    return [case(m, b, torch.bfloat16, True) for m in MLA for b in (1, 16, 48, 64)]


if __name__ == "__main__":
    main(cases, __doc__)
