"""Absorbed multi-head latent attention over the paged latent cache, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from zebra.ops._check import Check, acc_dtype
from zebra.ops._register import composite, fake

# Elements of the largest temporary of the composite: 256 MiB in fp32.
_CHUNK_ELEMENTS = 1 << 26


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_b_weight: Tensor | None = None,
    num_kv_heads: int = 0,
    kv_lora_rank: int = 0,
    split_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of a few new tokens over latents, without expanding keys and values.

    Equation:
        q~_h = U_k,g^T q_nope,h;  s_j = scale (q~_h . c_j + q_rope,h . k_rope,j);
        o_h = U_v,g sum_j softmax(s)_j c_j, g = h // (H / G)   (DeepSeek-V2, section 2.1.3)

    The T new tokens are the last of seq_lens, already in the cache; token t sees the first
    seq_len - T + t + 1 of them.  A token that sees none gives o = 0 and lse = -inf.

    Args:
        q: [B, T, H, Dn + E] with kv_b_weight, or latent queries [B, T, H, R + E] without; float32,
            bfloat16 or float16 (float64 on the CPU), contiguous in the last dimension.  T is 1 to
            16 where CUDA is to be fast; any T works.
        cache: [pages, page, R + E] of q's dtype, a row [c | k_rope] a token; pages and rows may be
            strided.
        block_table: [B, max_pages] int32, the pages of a sequence in order; entries past its last
            page are never followed.
        seq_lens: [B] int32, cached tokens of each sequence, the new ones included.
        scale: of the scores, usually (Dn + E) ** -0.5.
        kv_b_weight: [G * (Dn + Dv), R] of q's dtype: Dn key rows then Dv value rows a KV head.
        num_kv_heads: G, with kv_b_weight.
        kv_lora_rank: R, without kv_b_weight.
        split_size: cached tokens of one partial result, 0 for automatic (512 on the CPU; by the
            batch on CUDA, where a value, rounded up to a multiple of 64, makes the result of a
            sequence independent of the rest of the batch); results for two values differ by fp32
            rounding only.

    Returns:
        o [B, T, H, Dv] (or R for latent queries) like q, and lse [B, T, H] fp32, natural logarithm
        (fp64 for fp64).

    Raises:
        RuntimeError: on a wrong shape, dtype or device; on the CPU also where seq_lens or a used
            block_table entry is out of range (CUDA does not read values on the host; it takes the
            nearest value in range); on CUDA also where 16-bit q is not aligned to 4 bytes, or the
            cache or kv_b_weight not to 16.

    Numerics:
        fp32 accuracy throughout (fp64 for fp64), one rounding to the output dtype; on the bf16
        matrix unit of a CPU (AMX) probabilities are rounded to bf16 once and absorbed queries to 16
        bits of mantissa; on CUDA probabilities of 16-bit dtypes are rounded to that dtype once, and
        so are absorbed queries and the latent output that kv_b_weight expands.  Deterministic; on
        the CPU independent of threads and of the rest of the batch.  Not differentiable.

    CUDA:
        Kernels for bfloat16 and float16, R up to 256 (on Hopper, with pages in multiples of 8
        tokens, up to 512) and E up to 64 in multiples of 8; with kv_b_weight, which two more
        kernels multiply with, also Dn up to 512 and Dv in multiples of 8.  Other dtypes and shapes
        are composites of PyTorch operations.  In a CUDA graph kv_b_weight is read ahead of the
        kernels launched before it, so nothing in the graph may write it; outside of graphs any
        order is safe.
    """
    return torch.ops.zebra.mla_decode(
        q,
        cache,
        block_table,
        seq_lens,
        scale,
        kv_b_weight,
        num_kv_heads,
        kv_lora_rank,
        split_size,
    )


@fake("mla_decode")
def _mla_decode_fake(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_b_weight: Tensor | None = None,
    num_kv_heads: int = 0,
    kv_lora_rank: int = 0,
    split_size: int = 0,
) -> tuple[Tensor, Tensor]:
    v_dim = kv_lora_rank
    if kv_b_weight is not None:
        nope = q.size(3) - (cache.size(2) - kv_b_weight.size(1))
        v_dim = kv_b_weight.size(0) // num_kv_heads - nope
    return q.new_empty(*q.shape[:3], v_dim), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


def _check(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    kv_b_weight: Tensor | None,
    num_kv_heads: int,
    kv_lora_rank: int,
    split_size: int,
) -> None:
    """csrc/mla_decode/mla_decode_torch.h, without the values of block_table and seq_lens."""
    check = Check("mla_decode")
    check.floating("q", q)
    ok = q.dim() == 4 and 0 not in q.shape[1:]
    check.that(ok, "q", q, "[B, T, H, Dn + E] with T, H >= 1")
    B, _, H, width = q.shape
    check.last_dim_contiguous("q", q)
    check.like("cache", cache, q, "q")
    ok = cache.dim() == 3 and 0 not in cache.shape[1:]
    check.that(ok, "cache", cache, "[pages, page, R + E]")
    check.last_dim_contiguous("cache", cache)
    depth = cache.size(2)
    if kv_b_weight is None:
        ok, given = 0 < kv_lora_rank <= depth, " where kv_b_weight is not given"
        check.that(ok, "kv_lora_rank", kv_lora_rank, "1 to R + E = ", depth, given)
        check.shape("q", q, (-1, -1, -1, depth), "[B, T, H, R + E]")
    else:
        G, legend = num_kv_heads, "[G * (Dn + Dv), R]"
        check.like("kv_b_weight", kv_b_weight, q, "q")
        check.that(kv_b_weight.dim() == 2, "kv_b_weight", kv_b_weight, legend)
        ok = G > 0 and H % G == 0
        check.that(ok, "num_kv_heads", G, "given with kv_b_weight and divide H = ", H)
        rows, R = kv_b_weight.shape
        ok, columns = kv_lora_rank in (0, R), ", the columns of kv_b_weight"
        check.that(ok, "kv_lora_rank", kv_lora_rank, "0 or R = ", R, columns)
        ok = 0 < R <= depth
        check.that(ok, "kv_b_weight", kv_b_weight, legend, " with 1 <= R <= R + E = ", depth)
        nope = width - (depth - R)
        check.that(nope >= 0, "q", q, "at least E = ", depth - R, " wide")
        ok, heads = rows % G == 0 and rows // G > nope, f" with G = {G}, Dn = {nope} and Dv >= 1"
        check.that(ok, "kv_b_weight", kv_b_weight, legend, heads)
    check.dtype("block_table", block_table, torch.int32)
    check.same_device("block_table", block_table, q)
    check.shape("block_table", block_table, (B, -1), "[B, max_pages]")
    check.last_dim_contiguous("block_table", block_table)
    check.dtype("seq_lens", seq_lens, torch.int32)
    check.same_device("seq_lens", seq_lens, q)
    check.shape("seq_lens", seq_lens, (B,), "[B]")
    check.that(split_size >= 0, "split_size", split_size, "0 (automatic) or a number of tokens")


@composite("mla_decode", beside_kernel="_mla_decode_composite")
def _mla_decode_composite(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_b_weight: Tensor | None = None,
    num_kv_heads: int = 0,
    kv_lora_rank: int = 0,
    split_size: int = 0,
) -> tuple[Tensor, Tensor]:
    tables = (block_table, seq_lens)
    _check(q, cache, *tables, kv_b_weight, num_kv_heads, kv_lora_rank, split_size)
    B, T, H, _ = q.shape
    pages, page, depth = cache.shape
    acc = acc_dtype(q)
    R = kv_lora_rank if kv_b_weight is None else kv_b_weight.size(1)
    query = q.to(acc)
    if kv_b_weight is not None:
        nope = q.size(3) - (depth - R)
        up = kv_b_weight.to(acc).unflatten(0, (num_kv_heads, -1))  # [G, Dn + Dv, R]
        grouped = query[..., :nope].unflatten(2, (num_kv_heads, -1))
        latent_q = torch.einsum("btghd,gdr->btghr", grouped, up[:, :nope]).flatten(2, 3)
        query = torch.cat((latent_q, query[..., nope:]), dim=-1)
    query = query.flatten(1, 2) * scale  # [B, T * H, R + E]

    top = query.new_full((B, T * H), float("-inf"))
    total = query.new_zeros(B, T * H)
    o = query.new_zeros(B, T * H, R)
    new = torch.arange(T, device=q.device).repeat_interleave(H)
    seen = seq_lens[:, None] - (T - 1) + new  # [B, T * H]: tokens that a row sees
    step = max(1, _CHUNK_ELEMENTS // (max(B, 1) * page * max(depth, T * H)))
    for first in range(0, block_table.size(1) if pages > 0 else 0, step):
        # Table entries past the sequence may be anything, and cache rows past it may hold NaN.
        table = block_table[:, first : first + step].clamp(0, pages - 1).long()
        token = torch.arange(
            first * page, (first + table.size(1)) * page, device=q.device, dtype=torch.int32
        )
        latent = cache[table].flatten(1, 2).to(acc)  # [B, S, R + E]
        latent = torch.where((token < seq_lens[:, None])[..., None], latent, 0.0)
        s = torch.bmm(query, latent.transpose(1, 2))
        s = torch.where(token < seen[..., None], s, float("-inf"))
        peak = torch.maximum(top, s.amax(-1))
        base = torch.where(peak == float("-inf"), 0.0, peak)
        shift = torch.exp(top - base)
        p = torch.exp(s - base[..., None])
        total = total * shift + p.sum(-1)
        o = o * shift[..., None] + torch.bmm(p, latent[..., :R])
        top = peak
    o = torch.where(total[..., None] == 0, 0.0, o / total[..., None]).view(B, T, H, R)
    lse = torch.where(total == 0, float("-inf"), top + total.log()).view(B, T, H)
    if kv_b_weight is not None:
        grouped = o.unflatten(2, (num_kv_heads, -1))
        o = torch.einsum("btghr,gdr->btghd", grouped, up[:, nope:]).flatten(2, 3)
    return o.to(q.dtype).contiguous(), lse
