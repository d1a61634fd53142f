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


def check(args, op=ops.mla_decode):
    truth, eager, got = reference.mla_decode(**wide(args)), reference.mla_decode(**args), op(**args)
    for name, g, t, e in zip(("o", "lse"), got, truth, eager, strict=True):
        assert g.shape == t.shape and g.dtype == e.dtype
        bf16_lse = name == "lse" and args["q"].dtype == torch.bfloat16
        key = ("mla_decode.lse", torch.bfloat16) if bf16_lse else ("mla_decode", g.dtype)
        assert_close(g, t, e, tolerances.factor(*key), name)
    return got
