"""From grouped-query attention to MLA: truncated SVD of the projections."""

from __future__ import annotations

import torch
from torch import Tensor


def gqa_to_mla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_lora_rank: int | None,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    rope_aware: bool = False,
    rope_gain: float = 1.0,
) -> dict[str, Tensor]:
    """Initialise an MLA mixer from attention weights (Zebra-Llama, algorithm 1).

    W_Q = U S V^T:  q_a = S V^T (first q_lora_rank rows), q_b = the kept rows of U.
    [W_K; W_V] = U S V^T:  kv_a's latent rows = S V^T (first kv_lora_rank rows), kv_b = the kept
    rows of U.  kv_a's rope rows = the kept rope rows of W_K, averaged over the KV heads.

    Rows kept per head: the first qk_nope_head_dim are the nope part, the last qk_rope_head_dim the
    rope part.  With ``rope_aware`` the rope part is made of whole pairs of the teacher's rotation,
    (i, i + d/2) for every (d / qk_rope_head_dim)-th i, laid out as adjacent pairs, so that each
    keeps its frequency; the nope part is what remains.  And the shared rope key is not the average:
    a pair of rows is one complex row k_g, rotation multiplies it by e^(i w t), and complex factors
    a_g commute with that; so k_g ~ a_g k with the best such k (an SVD over the KV heads), and the
    queries of group g are multiplied by conj(a_g).  With one KV head nothing is lost.

    Args:
        q: [num_heads * d, hidden] query projection.
        k: [num_kv_heads * d, hidden] key projection.
        v: [num_kv_heads * d, hidden] value projection.
        o: [hidden, num_heads * d] output projection, kept as it is.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        q_lora_rank: Query rank; None keeps the queries at full rank in one projection.
        kv_lora_rank: Latent width.
        qk_nope_head_dim: Nope rows per head.
        qk_rope_head_dim: Rope rows per head; with qk_nope_head_dim at most d.
        rope_aware: Choose the rope rows by frequency and fit the shared key; False is the paper's
            form.
        rope_gain: With rope_aware, what the student's rotation multiplies rope scores by (the
            square of YaRN's magnitude over the teacher's); the shared key is divided by it.

    Returns:
        The state dict of a ``MultiheadLatentAttention`` without latent norms.

    Raises:
        ValueError: If the sizes do not fit together.

    Numerics:
        The SVD runs in fp32 (fp64 for fp64 weights); results have the dtype of the weights.
    """
    head_dim = q.size(0) // num_heads
    if k.size(0) != num_kv_heads * head_dim or v.shape != k.shape:
        raise ValueError(
            f"gqa_to_mla: k and v must be [{num_kv_heads * head_dim}, {q.size(1)}], "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    nope_rows, rope_rows = head_rows(head_dim, qk_nope_head_dim, qk_rope_head_dim, rope_aware)
    rows = torch.cat((nope_rows, rope_rows)).to(q.device)
    nope_rows, rope_rows = nope_rows.to(q.device), rope_rows.to(q.device)
    weights: dict[str, Tensor] = {}
    if rope_aware:
        q, k_rope = share_rope_key(q, k, rope_rows, num_heads, num_kv_heads)
        k_rope = k_rope / rope_gain
    else:
        k_rope = _wide(k).unflatten(0, (num_kv_heads, head_dim)).mean(0)[rope_rows]
    if q_lora_rank is None:
        weights["q_proj.weight"] = q.unflatten(0, (num_heads, head_dim))[:, rows].flatten(0, 1)
    else:
        up, weights["q_a_proj.weight"] = _factor(q, q_lora_rank, "q_lora_rank")
        up = up.unflatten(0, (num_heads, head_dim))[:, rows]
        weights["q_b_proj.weight"] = up.flatten(0, 1)
    up, latent = _factor(torch.cat((k, v)), kv_lora_rank, "kv_lora_rank")
    k_up, v_up = up.unflatten(0, (2, num_kv_heads, head_dim)).unbind(0)
    weights["kv_b_proj.weight"] = torch.cat((k_up[:, nope_rows], v_up), dim=1).flatten(0, 1)
    weights["kv_a_proj_with_mqa.weight"] = torch.cat((latent, k_rope))
    weights["out_proj.weight"] = o
    return {name: w.to(v.dtype).contiguous() for name, w in weights.items()}


def share_rope_key(
    q: Tensor, k: Tensor, rope_rows: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Fit one rope key for all KV heads, k_g ~ a_g k per rotated pair, and move a_g to the queries.

    Args:
        q: [num_heads * d, hidden].
        k: [num_kv_heads * d, hidden].
        rope_rows: [E] rows of a head, adjacent ones forming the pairs.
        num_heads: Query heads.
        num_kv_heads: KV heads.

    Returns:
        The queries with their rope rows multiplied by conj(a_g), and the shared key [E, hidden].
    """
    queries = _wide(q).unflatten(0, (num_heads, -1)).clone()
    pairs = _wide(k).unflatten(0, (num_kv_heads, -1))[:, rope_rows]  # [G, E, hidden]
    pairs = torch.complex(pairs[:, 0::2], pairs[:, 1::2]).transpose(0, 1)  # [E/2, G, hidden]
    u, s, vh = torch.linalg.svd(pairs, full_matrices=False)
    size = num_kv_heads**0.5  # a_g of modulus near 1
    factor = (u[..., 0] * size).conj().T.repeat_interleave(num_heads // num_kv_heads, 0)
    shared = torch.view_as_real(vh[:, 0] * s[:, :1] / size)  # [E/2, hidden, 2]
    turned = queries[:, rope_rows]
    turned = torch.complex(turned[:, 0::2], turned[:, 1::2]) * factor[..., None]
    queries[:, rope_rows] = torch.view_as_real(turned).movedim(-1, 2).flatten(1, 2)
    return queries.flatten(0, 1), shared.movedim(-1, 1).flatten(0, 1)


def head_rows(
    head_dim: int, nope_dim: int, rope_dim: int, rope_aware: bool
) -> tuple[Tensor, Tensor]:
    """Choose which rows of a head become its nope part and its rope part.

    Raises:
        ValueError: If the head is too small, or rope_aware finds no matching frequencies.
    """
    if nope_dim + rope_dim > head_dim:
        raise ValueError(
            f"gqa_to_mla: qk_nope_head_dim + qk_rope_head_dim must be at most head_dim = "
            f"{head_dim}, got {nope_dim} + {rope_dim}"
        )
    every = torch.arange(head_dim, device="cpu")
    if not rope_aware:
        return every[:nope_dim], every[head_dim - rope_dim :]
    if head_dim % rope_dim:
        raise ValueError(
            f"gqa_to_mla: rope_aware needs a qk_rope_head_dim that divides head_dim = {head_dim}, "
            f"got {rope_dim}"
        )
    first = torch.arange(0, head_dim // 2, head_dim // rope_dim, device="cpu")
    rope = torch.stack((first, first + head_dim // 2), dim=1).flatten()
    rest = every[~torch.isin(every, rope)]
    return rest[:nope_dim], rope


def rank_for_energy(weight: Tensor, energy: float, multiple: int = 16) -> int:
    """Return the smallest rank that keeps a share of a matrix's squared singular values.

    Args:
        weight: [m, n].
        energy: Share to keep, in (0, 1].
        multiple: Round the rank up to a multiple of this (kernels want 16), at most min(m, n).

    Raises:
        ValueError: If energy is out of range.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"rank_for_energy: energy must be in (0, 1], got {energy}")
    share = torch.linalg.svdvals(_wide(weight)).square().cumsum(0)
    rank = int((share < energy * share[-1] * (1 - 1e-6)).sum()) + 1
    return min(-(-rank // multiple) * multiple, min(weight.shape))


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _factor(weight: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """Split a matrix into up [m, rank] (orthonormal) times down [rank, n] (singular values in)."""
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"gqa_to_mla: {name} must be in [1, {min(weight.shape)}] for weights "
            f"{list(weight.shape)}, got {rank}"
        )
    u, s, vh = torch.linalg.svd(_wide(weight), full_matrices=False)
    return u[:, :rank], s[:rank, None] * vh[:rank]
