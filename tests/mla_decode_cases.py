"""Problems of mla_decode and their check against the fp64 truth, for every test of it."""

import tolerances
import torch

from zebra import ops
from zebra.ops import reference
from zebra.testing import assert_close

GARBAGE = 2147480000


def make(dims, lengths, dtype, device, tokens=1, page=16, spare=1, latent=False):
    """Arguments of mla_decode: a shuffled page table, and NaN wherever no token lies."""
    H, G, Dn, E, Dv, R = dims
    used = [-(-n // page) for n in lengths]
    max_pages, pages = max(used, default=0) + spare, sum(used) + 2
    cache = torch.full((pages, page, R + E), float("nan"))
    table = torch.full((len(lengths), max_pages), GARBAGE, dtype=torch.int32)
    table[:, -1] = -1
    free = torch.randperm(pages).tolist()
    for b, n in enumerate(lengths):
        for i in range(used[b]):
            at = free.pop()
            table[b, i] = at
            filled = min(page, n - i * page)
            cache[at, :filled] = torch.randn(filled, R + E)
    q = torch.randn(len(lengths), tokens, H, (R if latent else Dn) + E)
    weight = torch.randn(G * (Dn + Dv), R) / R**0.5
    args = {
        "q": q.to(dtype).to(device),
        "cache": cache.to(dtype).to(device),
        "block_table": table.to(device),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "scale": ((R if latent else Dn) + E) ** -0.5,
    }
    if latent:
        return args | {"kv_lora_rank": R}
    return args | {"kv_b_weight": weight.to(dtype).to(device), "num_kv_heads": G}


def wide(args):
    """The same arguments in fp64 on the CPU."""

    def convert(v):
        if not isinstance(v, torch.Tensor):
            return v
        return v.cpu().double() if v.is_floating_point() else v.cpu()

    return {k: convert(v) for k, v in args.items()}


def rounded(args):
    """Eager with the roundings that the CUDA kernel's form makes: absorbed queries and what it
    expands stand in the dtype of q, as nn.Linear would leave them."""
    if "kv_b_weight" not in args:
        return reference.mla_decode(**args)
    args = dict(args)
    weight, groups = args.pop("kv_b_weight"), args.pop("num_kv_heads")
    q, rank = args["q"], weight.size(1)
    nope = q.size(-1) - (args["cache"].size(-1) - rank)
    up = weight.float().unflatten(0, (groups, -1)).repeat_interleave(q.size(2) // groups, dim=0)
    latent = torch.einsum("bthd,hdr->bthr", q[..., :nope].float(), up[:, :nope]).to(q.dtype)
    args |= {"q": torch.cat((latent, q[..., nope:]), dim=-1), "kv_lora_rank": rank}
    o, lse = reference.mla_decode(**args)
    return torch.einsum("bthr,hdr->bthd", o.float(), up[:, nope:]).to(q.dtype), lse


def check(args, op=ops.mla_decode):
    dtype = args["q"].dtype
    on_matrix_unit = args["q"].is_cuda and dtype != torch.float32
    eager = rounded(args) if on_matrix_unit else reference.mla_decode(**args)
    truth, got = reference.mla_decode(**wide(args)), op(**args)
    for name, g, t, e in zip(("o", "lse"), got, truth, eager, strict=True):
        assert g.shape == t.shape and g.dtype == e.dtype
        if on_matrix_unit and (name == "o" or "kv_b_weight" in args):
            key = ("mla_decode.matrix_units", dtype)
        elif name == "lse" and dtype == torch.bfloat16:
            key = ("mla_decode.lse", dtype)
        else:
            key = ("mla_decode", g.dtype)
        assert_close(g, t, e, tolerances.factor(*key), name)
    return got
