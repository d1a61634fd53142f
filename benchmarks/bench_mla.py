"""Latent attention: decoding over a paged cache, and attention of training and prefill.

Eager decoding gathers the pages and absorbs with einsum; for latent queries its peers find the
latents in order.  Eager attention repeats the KV heads for
torch.nn.functional.scaled_dot_product_attention, as models write it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench_prefill import MLA
from harness import Case, Inputs, main
from torch import Tensor

from zebra import ops
from zebra.ops import reference

PAGE = 64


def decode_case(model: str, batch: int, length: int, dtype: torch.dtype) -> Case:
    _, H, G, R, Dn, E, Dv, _ = MLA[model]
    scale = (Dn + E) ** -0.5
    pages = length // PAGE

    def make(device: str) -> Inputs:
        table = torch.randperm(batch * pages, device=device).view(batch, pages).int()
        return {
            "q": torch.randn(batch, 1, H, Dn + E, device=device).to(dtype),
            "cache": torch.randn(batch * pages, PAGE, R + E, device=device).to(dtype),
            "table": table,
            "lens": torch.full((batch,), length, dtype=torch.int32, device=device),
            "w": (torch.randn(G * (Dn + Dv), R, device=device) / R**0.5).to(dtype),
        }

    def zebra(i: Inputs) -> list[Tensor]:
        args = (i["q"], i["cache"], i["table"], i["lens"], scale)
        return [ops.mla_decode(*args, kv_b_weight=i["w"], num_kv_heads=G, kv_lora_rank=R)[0]]

    def eager(i: Inputs) -> list[Tensor]:
        latent = i["cache"][i["table"].long()].flatten(1, 2)  # [B, S, R + E]
        up = i["w"].view(G, Dn + Dv, R).repeat_interleave(H // G, 0)
        q = i["q"][:, 0]
        q = torch.cat((torch.einsum("bhd,hdr->bhr", q[..., :Dn], up[:, :Dn]), q[..., Dn:]), -1)
        p = (torch.bmm(q, latent.transpose(1, 2)) * scale).softmax(-1)
        o = torch.bmm(p, latent[..., :R])
        return [torch.einsum("bhr,hdr->bhd", o, up[:, Dn:])[:, None]]

    def truth(i: Inputs) -> list[Tensor]:
        args = (i["q"].double(), i["cache"].double(), i["table"], i["lens"], scale)
        return [reference.mla_decode(*args, i["w"].double(), G, R)[0]]

    size = dtype.itemsize
    return Case(
        op="mla_decode",
        shape={"model": model, "B": batch, "S": length},
        dtype=dtype,
        bytes=size * (batch * (length * (R + E) + H * (Dn + E + Dv)) + G * (Dn + Dv) * R),
        flops=2 * batch * H * (length * (2 * R + E) + R * (Dn + Dv)),
        make=make,
        impls={"zebra": zebra, "eager": eager},
        truth=truth,
        max_error=2e-2 if size == 2 else 1e-5,
    )


def latent_case(model: str, batch: int, length: int) -> Case:
    """Latent queries.  Peers have the latents in order, gathered before they are timed."""
    _, H, _, R, Dn, E, *_ = MLA[model]
    scale, pages, dtype = (Dn + E) ** -0.5, length // PAGE, torch.bfloat16

    def make(device: str) -> Inputs:
        table = torch.randperm(batch * pages, device=device).view(batch, pages).int()
        cache = torch.randn(batch * pages, PAGE, R + E, device=device, dtype=dtype)
        return {
            "q": torch.randn(batch, 1, H, R + E, device=device, dtype=dtype),
            "cache": cache,
            "table": table,
            "lens": torch.full((batch,), length, dtype=torch.int32, device=device),
            "latent": cache[table.long()].flatten(1, 2),  # [B, S, R + E]
        }

    def zebra(i: Inputs) -> list[Tensor]:
        args = (i["q"], i["cache"], i["table"], i["lens"], scale)
        return [ops.mla_decode(*args, kv_lora_rank=R)[0]]

    def flash(i: Inputs) -> list[Tensor]:  # heads are rows of one head, values whole keys
        k = i["latent"][:, None]
        return [F.scaled_dot_product_attention(i["q"], k, k, scale=scale)[..., :R]]

    def eager(i: Inputs) -> list[Tensor]:
        s = torch.bmm(i["q"][:, 0], i["latent"].transpose(1, 2)) * scale
        return [torch.bmm(s.softmax(-1), i["latent"][..., :R])[:, None]]

    def truth(i: Inputs) -> list[Tensor]:
        parts = [
            eager({k: i[k][b : b + 1].double() for k in ("q", "latent")}) for b in range(batch)
        ]
        return [torch.cat([o for (o,) in parts])]

    return Case(
        op="mla_decode, latent queries",
        shape={"model": model, "B": batch, "S": length},
        dtype=dtype,
        bytes=2 * batch * (length * (R + E) + H * (2 * R + E)),
        flops=2 * batch * H * length * (2 * R + E),
        make=make,
        impls={"zebra": zebra, "SDPA, heads as rows": flash, "bmm, softmax, bmm": eager},
        truth=truth,
        max_error=2e-2,
    )


def attention_case(model: str, batch: int, tokens: int, dtype: torch.dtype, grad: bool) -> Case:
    _, H, G, _, Dn, E, Dv, _ = MLA[model]
    scale = (Dn + E) ** -0.5

    def make(device: str) -> Inputs:
        shapes = {"q": (H, Dn + E), "kv": (G, Dn + Dv), "do": (H, Dv)}
        made = {k: torch.randn(batch, tokens, *s, device=device) for k, s in shapes.items()}
        made["k_rope"] = torch.randn(batch, tokens, E, device=device)
        return {k: v.to(dtype) for k, v in made.items()}

    def zebra(q: Tensor, kv: Tensor, k_rope: Tensor) -> Tensor:
        return ops.mla_attention(q, kv, k_rope, scale)[0]

    def eager(q: Tensor, kv: Tensor, k_rope: Tensor) -> Tensor:
        rope = k_rope[:, :, None].expand(-1, -1, H, -1)
        k, v = kv.repeat_interleave(H // G, 2).split([Dn, Dv], -1)
        q, k, v = (t.transpose(1, 2) for t in (q, torch.cat((k, rope), -1), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    def run(fn, i: Inputs) -> list[Tensor]:
        leaves = [i[k] for k in ("q", "kv", "k_rope")]
        if not grad:
            return [fn(*leaves)]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in leaves]
            return list(torch.autograd.grad(fn(*leaves), leaves, i["do"].to(leaves[0].dtype)))

    pairs = batch * H * tokens * (tokens + 1) // 2
    forward = 2 * pairs * (Dn + E + Dv)
    moved = batch * tokens * (H * (Dn + E + Dv) + G * (Dn + Dv) + E) * dtype.itemsize
    return Case(
        op="mla_attention fwd+bwd" if grad else "mla_attention",
        shape={"model": model, "B": batch, "T": tokens},
        dtype=dtype,
        bytes=moved * (3 if grad else 1),
        flops=forward * 7 // 2 if grad else forward,
        make=make,
        impls={
            "zebra": lambda i: run(zebra, i),
            "SDPA, heads repeated": lambda i: run(eager, i),
        },
        truth=lambda i: run(eager, {k: v.double() for k, v in i.items()}),
        max_error=2e-2 if dtype.itemsize == 2 else 1e-5,
    )


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    dtypes = (torch.bfloat16,) if gpu else (torch.bfloat16, torch.float32)
    out = []
    if gpu:
        for model in MLA:
            for batch, length in [(1, 2048), (1, 32768), (8, 8192), (64, 2048), (64, 8192)]:
                out.append(latent_case(model, batch, length))
        out += [latent_case(m, b, 32768) for m, b in [("8b", 64), ("3b", 64), ("1b", 64)]]
        out += [latent_case(m, 256, 8192) for m in ("8b", "3b")]
    for dtype in dtypes:
        for model in MLA:
            decode = (
                [(1, 8192), (8, 8192), (64, 8192)] if gpu else [(1, 2048), (4, 2048), (16, 2048)]
            )
            out += [decode_case(model, b, s, dtype) for b, s in decode]
        for batch, tokens in [(8, 2048)] if gpu else [(1, 512), (1, 2048)]:
            for grad in (False, True):
                out.append(attention_case("8b", batch, tokens, dtype, grad))
    return out


if __name__ == "__main__":
    main(cases, __doc__)
