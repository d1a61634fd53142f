"""Multi-head latent attention in its expanded form, for training and prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zebra.ops import _attention_library as library
from zebra.ops._check import Check, acc_dtype
from zebra.ops._register import around, autograd, composite, fake

# Elements of the scores that the composite holds at once: 256 MiB in fp32.
_CHUNK_ELEMENTS = 1 << 26


def mla_attention(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped KV heads and one rotary key shared by all heads.

    Equation:
        s_j = scale (q_nope,h . k_nope,g,j + q_rope,h . k_rope,j);  o_h = sum_j softmax(s)_j v_g,j,
        g = h // (H / G)   (DeepSeek-V2, eq. 9-19; KV heads grouped as in GQA)

    Args:
        q: [B, T, H, Dn + E] float32, bfloat16 or float16 (float64 on the CPU).
        kv: [B, S, G, Dn + Dv] like q, S >= T: the key without position, then the value, of each KV
            head.  The T queries are the last T of the S positions.
        k_rope: [B, S, E] like q, rotated; E may be 0.
        scale: of the scores, usually (Dn + E) ** -0.5.
        cu_seqlens: [n_seq + 1] int32 for packed sequences (B = 1 and S = T), from 0 to T.
        causal: whether a query sees only the keys up to its own position.

    q, kv and k_rope may be views that are contiguous in their last dimension.

    Returns:
        o [B, T, H, Dv] like q, and lse [B, T, H] fp32, natural logarithm (fp64 for fp64).  Both
        are differentiable.

    Raises:
        RuntimeError: on a wrong shape, dtype or device, or (CPU only: CUDA does not read values on
            the host) where cu_seqlens does not rise from 0 to T.

    Numerics:
        fp32 throughout (fp64 for fp64), one rounding to the output dtype; on matrix units (AMX of a
        CPU, 16 bit on CUDA) probabilities, and the gradients of scores, are rounded to 16 bit once.
        Scores are never held whole.  Deterministic, gradients included, and on the CPU independent
        of threads; on CUDA 16-bit gradients are where torch.use_deterministic_algorithms is on.

    CUDA, 16 bit: cuDNN's attention on Hopper and later (equal widths of keys and values up to 128,
    or 192 and 128; causal with T = S or not causal; its gradients where 128 divides T and S), else
    torch's flash attention (equal widths up to 256), both with Dn, E and Dv multiples of 8; any
    other shape, and gradients through lse, in PyTorch operations.  The switches of
    torch.backends.cuda turn either library off.  A shape that cuDNN refuses raises.
    """
    return torch.ops.zebra.mla_attention(q, kv, k_rope, scale, cu_seqlens, causal)


@fake("mla_attention")
def _mla_attention_fake(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    v_dim = kv.size(3) - (q.size(3) - k_rope.size(2))
    return q.new_empty(*q.shape[:3], v_dim), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


@fake("mla_attention_backward")
def _mla_attention_backward_fake(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), k_rope.new_empty(k_rope.shape)


@fake("_mla_attention_keys")
def _keys_fake(kv: Tensor, k_rope: Tensor, nope_dim: int) -> Tensor:
    return kv.new_empty(*kv.shape[:3], nope_dim + k_rope.size(2))


@fake("_mla_attention_key_gradients")
def _key_gradients_fake(dkey: Tensor, dvalue: Tensor, nope_dim: int) -> tuple[Tensor, Tensor]:
    dkv = dkey.new_empty(*dkey.shape[:3], nope_dim + dvalue.size(3))
    return dkv, dkey.new_empty(*dkey.shape[:2], dkey.size(3) - nope_dim)


class _Eager:
    """The operands of the composites: [B, G, tokens (x H / G), ...] in the accumulation dtype."""

    def __init__(
        self,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
        causal: bool,
    ) -> None:
        B, S, self.G, _ = kv.shape
        self.T, self.H = q.size(1), q.size(2)
        acc, nope = acc_dtype(q), q.size(3) - k_rope.size(2)
        rope = k_rope[:, :, None].expand(-1, -1, self.G, -1)
        self.key = torch.cat((kv[..., :nope], rope), dim=-1).transpose(1, 2).to(acc)
        self.value = kv[..., nope:].transpose(1, 2).to(acc)
        self.scale, self.causal, self.past = scale, causal, S - self.T
        self.position = torch.arange(S, device=q.device)
        self.sequence: Tensor | None = None
        if cu_seqlens is not None:
            self.sequence = torch.searchsorted(
                cu_seqlens[1:].contiguous(), self.position.int(), right=True
            )
        step = max(1, _CHUNK_ELEMENTS // max(1, B * self.H * S))
        self.chunks = [(t, min(t + step, self.T)) for t in range(0, self.T, step)]

    def rows(self, x: Tensor, first: int, end: int) -> Tensor:
        """[B, T, H, ...] -> [B, G, (end - first) * H / G, ...], a row a (head, token)."""
        x = x[:, first:end].to(self.key.dtype).unflatten(2, (self.G, -1))
        return x.movedim(1, 3).flatten(2, 3)

    def tokens(self, x: Tensor, count: int) -> Tensor:
        """The inverse of :meth:`rows`."""
        return x.unflatten(2, (-1, count)).movedim(3, 1).flatten(2, 3)

    def keys(self, end: int) -> int:
        """How many keys the queries before ``end`` can see."""
        return self.past + end if self.causal else self.past + self.T

    def scores(self, q: Tensor, first: int, end: int) -> Tensor:
        """Scaled scores [B, G, rows, keys], -inf where a query may not see a key."""
        n = self.keys(end)
        s = torch.matmul(q, self.key[:, :, :n].transpose(2, 3)) * self.scale
        at = slice(self.past + first, self.past + end)
        allowed = torch.ones(end - first, n, dtype=torch.bool, device=q.device)
        if self.causal:
            allowed = self.position[:n] <= self.position[at, None]
        if self.sequence is not None:
            allowed = allowed & (self.sequence[:n] == self.sequence[at, None])
        return s.masked_fill(~allowed.repeat(self.H // self.G, 1), float("-inf"))


def _check(q: Tensor, kv: Tensor, k_rope: Tensor, cu_seqlens: Tensor | None) -> None:
    """csrc/mla_attention/mla_attention_torch.h, without the values of cu_seqlens."""
    check = Check("mla_attention")
    check.floating("q", q)
    ok = q.dim() == 4 and q.size(2) > 0 and q.size(3) > 0
    check.that(ok, "q", q, "[B, T, H, Dn + E] with H >= 1")
    B, T, H, width = q.shape
    check.last_dim_contiguous("q", q)
    check.like("k_rope", k_rope, q, "q")
    check.shape("k_rope", k_rope, (B, -1, -1), "[B, S, E]")
    check.last_dim_contiguous("k_rope", k_rope)
    S, nope = k_rope.size(1), width - k_rope.size(2)
    check.that(nope >= 0, "k_rope", k_rope, "[B, S, E] with E at most Dn + E = ", width)
    check.that(S >= T, "k_rope", k_rope, "[B, S, E] with S >= T = ", T)
    check.like("kv", kv, q, "q")
    check.shape("kv", kv, (B, S, -1, -1), "[B, S, G, Dn + Dv]")
    check.last_dim_contiguous("kv", kv)
    ok = kv.size(2) > 0 and H % kv.size(2) == 0
    check.that(ok, "kv", kv, "[B, S, G, Dn + Dv] with G a divisor of H = ", H)
    check.that(kv.size(3) > nope, "kv", kv, "[B, S, G, Dn + Dv] wider than Dn = ", nope)
    if cu_seqlens is not None:
        check.cu_seqlens(cu_seqlens, q, "q", "[1, T, H, Dn + E]")
        legend = "[B, S, E] with S = T = "
        check.that(S == T, "k_rope", k_rope, legend, T, " with cu_seqlens")


@around("_mla_attention_keys", "mla_attention", library.SERVED)
def _mla_attention_cuda(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    _check(q, kv, k_rope, cu_seqlens)
    problem = library.Problem.of(q, kv, k_rope, cu_seqlens, causal)
    served = library.choose(problem, library.Libraries.on(q.device))
    if served == library.COMPOSITE:
        return _mla_attention_composite(q, kv, k_rope, scale, cu_seqlens, causal)
    return library.forward(served, q, kv, k_rope, scale, cu_seqlens, problem.causal)


@around("_mla_attention_keys", "mla_attention_backward", library.SERVED)
def _mla_attention_backward_cuda(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = library.Problem.of(q, kv, k_rope, cu_seqlens, causal)
    deterministic = torch.are_deterministic_algorithms_enabled()
    served = library.choose(
        problem, library.Libraries.on(q.device), backward=True, deterministic=deterministic
    )
    if served == library.COMPOSITE or dlse is not None:  # no library takes lse's gradient
        return _mla_attention_backward_composite(
            do, dlse, q, kv, k_rope, o, lse, scale, cu_seqlens, causal
        )
    return library.backward(served, do, q, kv, k_rope, o, lse, scale, cu_seqlens, problem.causal)


@composite("mla_attention")
def _mla_attention_composite(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    _check(q, kv, k_rope, cu_seqlens)
    e = _Eager(q, kv, k_rope, scale, cu_seqlens, causal)
    o = q.new_empty(*q.shape[:3], e.value.size(-1))
    lse = q.new_empty(q.shape[:3], dtype=acc_dtype(q))
    for first, end in e.chunks:
        s = e.scores(e.rows(q, first, end), first, end)
        log_sum = s.logsumexp(-1, keepdim=True)
        p = torch.exp(s - log_sum)
        o[:, first:end] = e.tokens(torch.matmul(p, e.value[:, :, : e.keys(end)]), end - first)
        lse[:, first:end] = e.tokens(log_sum, end - first).squeeze(-1)
    return o, lse


@composite("mla_attention_backward")
def _mla_attention_backward_composite(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    e = _Eager(q, kv, k_rope, scale, cu_seqlens, causal)
    nope = q.size(3) - k_rope.size(2)
    delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkey, dvalue = torch.zeros_like(e.key), torch.zeros_like(e.value)
    for first, end in e.chunks:
        n = e.keys(end)
        rows, drows = e.rows(q, first, end), e.rows(do, first, end)
        p = torch.exp(e.scores(rows, first, end) - e.rows(lse[..., None], first, end))
        dp = torch.matmul(drows, e.value[:, :, :n].transpose(2, 3))
        ds = scale * p * (dp - e.rows(delta[..., None], first, end))
        dvalue[:, :, :n] += torch.matmul(p.transpose(2, 3), drows)
        dkey[:, :, :n] += torch.matmul(ds.transpose(2, 3), rows)
        dq[:, first:end] = e.tokens(torch.matmul(ds, e.key[:, :, :n]), end - first)
    dkv = torch.cat((dkey[..., :nope], dvalue), dim=-1).transpose(1, 2)
    dk_rope = dkey[..., nope:].sum(1)
    return dq, dkv.to(kv.dtype).contiguous(), dk_rope.to(k_rope.dtype)


@composite("_mla_attention_keys")
def _keys_composite(kv: Tensor, k_rope: Tensor, nope_dim: int) -> Tensor:
    rope = k_rope[:, :, None].expand(-1, -1, kv.size(2), -1)
    return torch.cat((kv[..., :nope_dim], rope), dim=-1)


@composite("_mla_attention_key_gradients")
def _key_gradients_composite(dkey: Tensor, dvalue: Tensor, nope_dim: int) -> tuple[Tensor, Tensor]:
    dk_rope = dkey[..., nope_dim:].float().sum(2).to(dkey.dtype)
    return torch.cat((dkey[..., :nope_dim], dvalue), dim=-1), dk_rope


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, k_rope, ctx.scale, cu_seqlens, ctx.causal = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, k_rope, *output, cu_seqlens)


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, kv, k_rope, o, lse, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dq, dkv, dk_rope = torch.ops.zebra.mla_attention_backward(
        do, dlse, q, kv, k_rope, o, lse, ctx.scale, cu_seqlens, ctx.causal
    )
    return dq, dkv, dk_rope, None, None, None


autograd("mla_attention", _backward, _setup)
