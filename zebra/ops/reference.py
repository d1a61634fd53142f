"""Every operator in a few lines of eager PyTorch: the truth the kernels are tested against.

Each function is written from its equation, token by token where the equation is a recurrence, and
is differentiable through autograd.  Arithmetic runs in at least fp32: float64 inputs give the fp64
truth, bf16 inputs give what an exact kernel would return after rounding its outputs.  Slow on
purpose.

Dimension legend: see :mod:`zebra.ops`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    """Return ``t`` in its accumulation dtype: fp64 stays fp64, everything else becomes fp32."""
    return t if t.dtype == torch.float64 else t.float()


def _bounds(batch: int, tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """List ``(batch row, first token, end token)`` of every sequence, packed or not."""
    if cu_seqlens is None:
        return [(b, 0, tokens) for b in range(batch)]
    cu = cu_seqlens.tolist()
    return [(0, first, end) for first, end in pairwise(cu)]


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """y = w * s / sqrt(mean(s^2) + eps) with s = x + residual; returns (y, s)."""
    s = _wide(x) if residual is None else _wide(x) + _wide(residual)
    y = _wide(weight) * s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype), s.to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """y[t, c] = act(b[c] + sum_w weight[c, w] x[t - (W-1) + w, c]); x before 0 is the state."""
    width = weight.size(1)
    w, ys, states = _wide(weight), [], []
    for i, (b, first, end) in enumerate(_bounds(x.size(0), x.size(1), cu_seqlens)):
        seq = _wide(x[b, first:end])  # [t, C]
        past = (
            seq.new_zeros(width - 1, x.size(2))
            if initial_state is None
            else _wide(initial_state[i]).t()
        )
        full = torch.cat([past, seq])  # [W-1+t, C]
        y = sum(full[k : k + end - first] * w[:, k] for k in range(width))
        assert isinstance(y, Tensor)
        y = y if bias is None else y + _wide(bias)
        ys.append(F.silu(y) if activation == "silu" else y)
        states.append(full[full.size(0) - (width - 1) :].t())
    y = torch.stack(ys) if cu_seqlens is None else torch.cat(ys)[None]
    return y.to(x.dtype), torch.stack(states).to(x.dtype)


def causal_conv1d_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of :func:`causal_conv1d`; returns (y [B, C], the new conv_state)."""
    slots = range(x.size(0)) if state_indices is None else state_indices.tolist()
    state, ys = conv_state.clone(), []
    for b, slot in enumerate(slots):
        if slot < 0:  # a padding row
            ys.append(torch.zeros_like(x[b]))
            continue
        y, last = causal_conv1d(x[b, None, None], weight, bias, state[slot, None], None, activation)
        state[slot] = last[0]
        ys.append(y[0, 0])
    return torch.stack(ys) if ys else x.clone(), state


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = True,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(A d_t) S_{t-1} + d_t x_t B_t^T,  y_t = S_t C_t + D x_t  (Mamba-2, eq. 1 and 2).

    d = softplus(dt + dt_bias).  With z, u = y * silu(z); with norm_weight,
    u = w * u * rsqrt(mean_P(u^2) + eps) per head.
    """
    heads = A.size(0)
    xw, Bw, Cw = (_wide(t).repeat_interleave(heads // t.size(2), dim=2) for t in (x, B, C))
    d = _wide(dt) if dt_bias is None else _wide(dt) + _wide(dt_bias)
    d = F.softplus(d) if dt_softplus else d
    decay = torch.exp(d * _wide(A))  # [B, T, H]
    ys, states = [], []
    for i, (b, first, end) in enumerate(_bounds(x.size(0), x.size(1), cu_seqlens)):
        state = (
            xw.new_zeros(heads, x.size(3), B.size(3))
            if initial_state is None
            else _wide(initial_state[i]).to(xw.dtype)
        )
        rows = []
        for t in range(first, end):
            update = (d[b, t, :, None] * xw[b, t])[..., None] * Bw[b, t, :, None, :]
            state = decay[b, t, :, None, None] * state + update
            rows.append((state * Cw[b, t, :, None, :]).sum(-1))
        ys.append(torch.stack(rows) if rows else xw.new_zeros(0, heads, x.size(3)))
        states.append(state)
    y = torch.stack(ys) if cu_seqlens is None else torch.cat(ys)[None]
    y = y if D is None else y + _wide(D)[:, None] * xw
    return gated_norm(y, z, norm_weight, norm_eps).to(x.dtype), torch.stack(states)


def gated_norm(y: Tensor, z: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """The epilogue of a Mamba2 mixer: gate by silu(z), then RMSNorm over each head's P values."""
    u = y if z is None else y * F.silu(_wide(z))
    if weight is None:
        return u
    return _wide(weight).view(u.shape[-2:]) * u * torch.rsqrt(u.square().mean(-1, True) + eps)


def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    n_groups: int,
    state_indices: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token: conv, SSM update, gate, norm; returns (y, new conv_state, new ssm_state)."""
    _, H, P, N = ssm_state.shape
    z, xbc, dt = zxbcdt.split([H * P, n_groups * (P + N) + H * N, H], dim=-1)
    xbc, conv_state = causal_conv1d_step(
        xbc, conv_state, conv_weight, conv_bias, "silu", state_indices
    )
    x, B, C = xbc.split([n_groups * P, n_groups * N, H * N], dim=-1)
    slots = range(zxbcdt.size(0)) if state_indices is None else state_indices.tolist()
    state, ys = ssm_state.clone(), []
    for b, slot in enumerate(slots):
        if slot < 0:
            ys.append(zxbcdt.new_zeros(H * P))
            continue
        y, last = ssd_scan(
            x[b].view(1, 1, n_groups, P),
            dt[b].view(1, 1, H),
            A,
            B[b].view(1, 1, n_groups, N),
            C[b].view(1, 1, H, N),
            D,
            z[b].view(1, 1, H, P),
            dt_bias,
            norm_weight,
            state[slot, None],
            norm_eps=norm_eps,
        )
        state[slot] = last[0].to(state.dtype)
        ys.append(y.reshape(H * P))
    y = torch.stack(ys) if ys else zxbcdt.new_zeros(0, H * P)
    return y, conv_state, state


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs: (x0, x1) -> (x0 c - x1 s, x0 s + x1 c); cos, sin broadcast to x/2."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def mla_project(
    hidden: Tensor,
    q_a_weight: Tensor | None,
    q_b_weight: Tensor,
    kv_a_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_heads: int,
    q_a_norm_weight: Tensor | None = None,
    kv_a_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """c_q = W_qa x, q = W_qb c_q; [c | k] = W_kva x; rope parts rotated; latent = [c | k_rope]."""
    E, x = 2 * cos.size(-1), _wide(hidden)
    c_q = x if q_a_weight is None else x @ _wide(q_a_weight).t()
    if q_a_norm_weight is not None:
        c_q = rms_norm(c_q, q_a_norm_weight, eps=norm_eps)[0]
    q = (c_q @ _wide(q_b_weight).t()).unflatten(-1, (num_heads, -1))
    c, k_rope = (x @ _wide(kv_a_weight).t()).split([kv_a_weight.size(0) - E, E], dim=-1)
    if kv_a_norm_weight is not None:
        c = rms_norm(c, kv_a_norm_weight, eps=norm_eps)[0]
    cos, sin = _wide(cos)[positions].to(x.dtype), _wide(sin)[positions].to(x.dtype)  # [B, T, E/2]
    q_nope, q_rope = q.split([q.size(-1) - E, E], dim=-1)
    q = torch.cat((q_nope, rotate(q_rope, cos[:, :, None], sin[:, :, None])), dim=-1)
    latent = torch.cat((c, rotate(k_rope, cos, sin)), dim=-1)
    return q.to(hidden.dtype), latent.to(hidden.dtype)


def mla_attention(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """o = softmax(scale * q [k_nope | k_rope]^T) v, query head h on KV head h // (H/G); and lse.

    kv may hold S >= T tokens (a cached prefix); the T queries are its last T positions.
    """
    G, H, nope = kv.size(2), q.size(2), q.size(3) - k_rope.size(-1)
    kv, qw, k_rope = _wide(kv), _wide(q), _wide(k_rope)
    key = torch.cat((kv[..., :nope], k_rope[:, :, None].expand(-1, -1, G, -1)), dim=-1)
    key, value = (t.repeat_interleave(H // G, dim=2) for t in (key, kv[..., nope:]))
    o, lse = torch.zeros_like(qw[..., :1]).expand(*q.shape[:3], value.size(-1)).clone(), None
    lse = qw.new_full(q.shape[:3], float("-inf"))
    rows_o, rows_lse = [], []
    for b, first, end in _bounds(q.size(0), q.size(1), cu_seqlens):
        keys = slice(0, kv.size(1)) if cu_seqlens is None else slice(first, end)
        s = scale * torch.einsum("thd,shd->ths", qw[b, first:end], key[b, keys])
        if causal:
            t, n = s.size(0), s.size(2)
            above = (
                torch.arange(n, device=s.device) > torch.arange(t, device=s.device)[:, None] + n - t
            )
            s = s.masked_fill(above[:, None], float("-inf"))
        rows_o.append(torch.einsum("ths,shd->thd", s.softmax(-1), value[b, keys]))
        rows_lse.append(s.logsumexp(-1))
    stack = torch.stack if cu_seqlens is None else lambda rows: torch.cat(rows)[None]
    o, lse = (stack(rows_o), stack(rows_lse)) if rows_o else (o, lse)
    return o.to(q.dtype), lse


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_b_weight: Tensor | None = None,
    num_kv_heads: int = 0,
    kv_lora_rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA: s = scale * (U_k^T q_nope . c + q_rope . k_rope), o = U_v sum softmax(s) c.

    seq_lens counts the T new tokens, already in the cache; query t sees seq_len - T + t + 1 tokens.
    """
    T, H, page = q.size(1), q.size(2), cache.size(1)
    R = kv_lora_rank if kv_b_weight is None else kv_b_weight.size(1)
    qw, nope = _wide(q), q.size(3) - (cache.size(2) - R)
    if kv_b_weight is not None:
        up = _wide(kv_b_weight).unflatten(0, (num_kv_heads, -1))  # [G, Dn + Dv, R]
        up = up.repeat_interleave(H // num_kv_heads, dim=0)
        q_lat = torch.einsum("bthd,hdr->bthr", qw[..., :nope], up[:, :nope])
        qw = torch.cat((q_lat, qw[..., nope:]), dim=-1)
    o = qw.new_zeros(*q.shape[:3], R)
    lse = qw.new_full(q.shape[:3], float("-inf"))
    for b, length in enumerate(seq_lens.tolist()):
        pages = block_table[b, : (length + page - 1) // page].long()
        latent = _wide(cache[pages]).flatten(0, 1)[:length]  # [S, R + E]
        for t in range(max(0, T - length), T):
            seen = latent[: length - T + t + 1]
            s = scale * qw[b, t] @ seen.t()  # [H, S]
            o[b, t], lse[b, t] = s.softmax(-1) @ seen[:, :R], s.logsumexp(-1)
    if kv_b_weight is not None:
        o = torch.einsum("bthr,hdr->bthd", o, up[:, nope:])
    return o.to(q.dtype), lse


def linear_decode(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    norm_eps: float = 1e-5,
    up_weight: Tensor | None = None,
) -> Tensor:
    """y = act(W norm(x) + b) + residual; "swiglu" splits W: silu(W_gate x) * (W_up x)."""
    h = _wide(x) if norm_weight is None else rms_norm(_wide(x), norm_weight, eps=norm_eps)[0]
    y = h @ _wide(weight if up_weight is None else torch.cat((weight, up_weight))).t()
    y = y if bias is None else y + _wide(bias)
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    y = y if residual is None else y + _wide(residual)
    return y.to(x.dtype)


def fused_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) of every token, in nats: sum_v p_T (log p_T - log p_S), [M] fp32."""
    log_s = F.log_softmax(_wide(student_hidden) @ _wide(student_weight).t() / temperature, dim=-1)
    log_t = F.log_softmax(_wide(teacher_hidden) @ _wide(teacher_weight).t() / temperature, dim=-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)
