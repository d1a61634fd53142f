"""Projections of multi-head latent attention: queries, and the latents that are cached."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zebra.ops import reference
from zebra.ops._check import Check
from zebra.ops._register import autograd, composite, fake, optional


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
    """Queries and latents of latent attention, rotary embedding applied.

    Equation:
        c_q = W_qa x;  q_h = [q_nope | RoPE(q_rope)] of W_qb,h c_q;  [c | k] = W_kva x;
        latent = [c | RoPE(k)]   (DeepSeek-V2, eq. 9-15)
        RoPE turns adjacent pairs: (x_2i, x_2i+1) -> (x_2i cos_i - x_2i+1 sin_i,
        x_2i sin_i + x_2i+1 cos_i) at the token's position.

    Args:
        hidden: [B, T, D] float32, bfloat16 or float16 (float64 on the CPU).
        q_a_weight: [Rq, D] like hidden, or None where q_b_weight applies to hidden itself.
        q_b_weight: [H * (Dn + E), Rq] (or D columns): Dn rows then E rotated rows a head.
        kv_a_weight: [R + E, D].
        cos: [maxpos, E / 2] float32, contiguous; includes any magnitude factor (YaRN).
        sin: like cos.
        positions: [B, T] int32 or int64, rows of cos and sin.
        num_heads: H.
        q_a_norm_weight: [Rq] of hidden's dtype or float32: RMSNorm of c_q where given.
        kv_a_norm_weight: [R]: RMSNorm of c where given.
        norm_eps: of both norms.

    Returns:
        q [B, T, H, Dn + E] and latent [B, T, R + E], like hidden.

    Raises:
        RuntimeError: on a wrong shape, dtype or device; on the CPU also where a position is outside
            the tables (CUDA does not read values on the host).

    Numerics:
        Matrix products are PyTorch's and round to hidden's dtype, as nn.Linear does; norms and
        rotation are fp32 (fp64 for fp64) with one rounding.  Differentiable in hidden and weights;
        cos and sin get no gradient.

    Memory:
        For gradients c_q is kept beside hidden, Rq numbers a token; without q_a_weight, or where
        none of the arguments requires grad, nothing is.
    """
    arguments = (
        hidden, q_a_weight, q_b_weight, kv_a_weight, cos, sin, positions, num_heads,
        q_a_norm_weight, kv_a_norm_weight, norm_eps,
    )  # fmt: skip
    weights = (q_a_weight, q_b_weight, kv_a_weight, q_a_norm_weight, kv_a_norm_weight)
    grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, *weights)
    )
    if q_a_weight is None or not grad:
        return torch.ops.zebra.mla_project(*arguments)
    q, latent, _ = torch.ops.zebra.mla_project_training(*arguments)
    return q, latent


def mla_project_append(
    hidden: Tensor,
    q_a_weight: Tensor | None,
    q_b_weight: Tensor,
    kv_a_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_heads: int,
    cache: Tensor,
    slot_mapping: Tensor,
    q_a_norm_weight: Tensor | None = None,
    kv_a_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    input_norm_weight: Tensor | None = None,
    input_norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """:func:`mla_project`, which also stores the latents in a paged cache.

    Equation:
        x = input_norm_weight * hidden / sqrt(mean(hidden^2) + input_norm_eps), or hidden itself
        cache[slot // page, slot % page] = latent  for every token with slot >= 0

    Args:
        hidden: see :func:`mla_project`, as all arguments that are not named here.
        q_a_weight: see there.
        q_b_weight: see there.
        kv_a_weight: see there.
        cos: see there.
        sin: see there.
        positions: see there.
        num_heads: see there.
        cache: [pages, page, R + E] like hidden, changed in place; pages and rows may be strided,
            but may not overlap.
        slot_mapping: [B, T] int64: page index * page + offset; negative where a token is not
            stored (padding).  Slots are distinct.
        q_a_norm_weight: see there.
        kv_a_norm_weight: see there.
        norm_eps: see there.
        input_norm_weight: [D] of hidden's dtype or float32: RMSNorm of hidden where given.
        input_norm_eps: of that norm.

    Returns:
        q and latent as of :func:`mla_project`.

    Raises:
        RuntimeError: as :func:`mla_project`; on the CPU also where a slot is outside the cache,
            before anything is written.

    Numerics:
        As :func:`mla_project`; the norm of hidden is fp32 and rounds to hidden's dtype.  On Hopper,
        up to 128 tokens of bfloat16 or float16 without kv_a_norm_weight, the products of q and of
        the latent are not rounded before the rotation, only c_q and the results are.  Not
        differentiable: for inference.

    In a CUDA graph the weights are read ahead of the kernels launched before, so nothing in the
    graph may write them; outside of graphs any order is safe.
    """
    return torch.ops.zebra.mla_project_append(
        hidden, q_a_weight, q_b_weight, kv_a_weight, cos, sin, positions, num_heads,
        cache, slot_mapping, q_a_norm_weight, kv_a_norm_weight, norm_eps,
        input_norm_weight, input_norm_eps,
    )  # fmt: skip


@fake("mla_project")
def _mla_project_fake(
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
    B, T, _ = hidden.shape
    q = hidden.new_empty(B, T, num_heads, q_b_weight.size(0) // num_heads)
    return q, hidden.new_empty(B, T, kv_a_weight.size(0))


@fake("mla_project_training")
def _mla_project_training_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, q_a_weight = arguments[:2]
    c_q = hidden.new_empty(*hidden.shape[:2], q_a_weight.size(0))
    return (*_mla_project_fake(*arguments), c_q)


@fake("mla_project_append")
def _mla_project_append_fake(
    hidden: Tensor,
    q_a_weight: Tensor | None,
    q_b_weight: Tensor,
    kv_a_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_heads: int,
    cache: Tensor,
    slot_mapping: Tensor,
    q_a_norm_weight: Tensor | None = None,
    kv_a_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    input_norm_weight: Tensor | None = None,
    input_norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    return _mla_project_fake(
        hidden, q_a_weight, q_b_weight, kv_a_weight, cos, sin, positions, num_heads
    )


@fake("mla_project_backward")
def _mla_project_backward_fake(
    dq: Tensor,
    dlatent: Tensor,
    hidden: Tensor,
    q_a_weight: Tensor | None,
    q_b_weight: Tensor,
    kv_a_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_heads: int,
    q_a_norm_weight: Tensor | None,
    kv_a_norm_weight: Tensor | None,
    norm_eps: float,
    c_q: Tensor | None,
) -> tuple[Tensor, ...]:
    def grad(w: Tensor | None) -> Tensor:
        return hidden.new_empty(0) if w is None else w.new_empty(w.shape)

    return (
        grad(hidden),
        grad(q_a_weight),
        grad(q_b_weight),
        grad(kv_a_weight),
        grad(q_a_norm_weight),
        grad(kv_a_norm_weight),
    )


class Angles(NamedTuple):
    """cos and sin of every token, [B, T, E / 2] fp32."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the last 2 * E / 2 columns of x [B, T, ..., n]; returns x's dtype."""
        E = 2 * self.cos.size(-1)
        shape = (*self.cos.shape[:2], *([1] * (x.dim() - 3)), E // 2)
        head, tail = x.split([x.size(-1) - E, E], dim=-1)
        tail = reference.rotate(tail.float(), self.cos.view(shape), self.sin.view(shape))
        return torch.cat((head, tail.to(x.dtype)), dim=-1)

    def assemble(self, q: Tensor, c: Tensor, k: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """Products q [B, T, H * (Dn + E)], c [B, T, R] and k [B, T, E] -> queries and latents."""
        q = q.unflatten(-1, (num_heads, -1))
        return self.rotate(q), self.rotate(torch.cat((c, k), dim=-1))


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else reference.rms_norm(x, weight, eps=eps)[0]


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`_norm`; the second is empty where there is no weight."""
    if weight is None:
        return dy, dy.new_empty(0)
    g, s = dy.float(), x.float()
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    dw = (g * s * rstd).flatten(0, -2).sum(0)
    g = g * weight.float()
    dx = rstd * (g - s * rstd.square() * (g * s).mean(-1, keepdim=True))
    return dx.to(x.dtype), dw.to(weight.dtype)


class _Inputs(NamedTuple):
    """The arguments that both operators share."""

    hidden: Tensor
    q_a_weight: Tensor | None
    q_b_weight: Tensor
    kv_a_weight: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    num_heads: int
    q_a_norm_weight: Tensor | None
    kv_a_norm_weight: Tensor | None
    norm_eps: float
    input_norm_weight: Tensor | None = None
    input_norm_eps: float = 0.0

    def check(self, check: Check) -> None:
        """csrc/mla_project/mla_project_torch.h, without the values of positions."""
        x = self.hidden

        def weight(name: str, w: Tensor, columns: int, legend: str) -> None:
            check.like(name, w, x, "hidden")
            check.shape(name, w, (-1, columns), legend)
            check.that(w.size(0) > 0, name, w, "non-empty")

        def norm(name: str, w: Tensor | None, size: int, legend: str) -> None:
            if w is None:
                return
            check.same_device(name, w, x)
            check.floating(name, w)
            ok = w.dtype in (x.dtype, torch.float32)
            check.that(ok, name, w, x.dtype, " like hidden, or float32")
            check.shape(name, w, (size,), legend)
            check.contiguous(name, w)

        check.floating("hidden", x)
        check.that(x.dim() == 3 and x.size(2) > 0, "hidden", x, "[B, T, D] with D >= 1")
        B, T, rank_q = x.shape
        q_legend = "[H * (Dn + E), D]"
        if self.q_a_weight is not None:
            weight("q_a_weight", self.q_a_weight, x.size(2), "[Rq, D]")
            rank_q, q_legend = self.q_a_weight.size(0), "[H * (Dn + E), Rq]"
        weight("q_b_weight", self.q_b_weight, rank_q, q_legend)
        weight("kv_a_weight", self.kv_a_weight, x.size(2), "[R + E, D]")
        sizes: tuple[int, ...] = (-1, -1)
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            check.dtype(name, table, torch.float32)
            check.same_device(name, table, x)
            check.shape(name, table, sizes, "[maxpos, E / 2]")
            check.contiguous(name, table)
            sizes = tuple(self.cos.shape)
        E, H, rows = 2 * self.cos.size(1), self.num_heads, self.q_b_weight.size(0)
        R = self.kv_a_weight.size(0) - E
        want = ("[R + E, D] with more rows than E = ", E)
        check.that(R > 0, "kv_a_weight", self.kv_a_weight, *want)
        want = ("a divisor of the rows of q_b_weight, ", rows)
        check.that(H > 0 and rows % H == 0, "num_heads", H, *want)
        legend = ("[H * (Dn + E), Rq] with H = ", H, " and Dn + E >= E = ", E)
        check.that(rows // H >= E, "q_b_weight", self.q_b_weight, *legend)
        ok = self.positions.dtype in (torch.int32, torch.int64)
        check.that(ok, "positions", self.positions, "int32 or int64")
        check.same_device("positions", self.positions, x)
        check.shape("positions", self.positions, (B, T), "[B, T]")
        norm("q_a_norm_weight", self.q_a_norm_weight, rank_q, "[Rq]")
        norm("kv_a_norm_weight", self.kv_a_norm_weight, R, "[R]")
        norm("input_norm_weight", self.input_norm_weight, x.size(2), "[D]")

    def query_latent(self, x: Tensor) -> Tensor:
        """c_q before its norm."""
        return x if self.q_a_weight is None else F.linear(x, self.q_a_weight)

    def project(self, c_q: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The queries and the latents."""
        x, eps = _norm(self.hidden, self.input_norm_weight, self.input_norm_eps), self.norm_eps
        angles = Angles(self.cos[self.positions], self.sin[self.positions])
        c_q = self.query_latent(x) if c_q is None else c_q
        q = F.linear(_norm(c_q, self.q_a_norm_weight, eps), self.q_b_weight)
        R = self.kv_a_weight.size(0) - 2 * self.cos.size(-1)
        c, k = F.linear(x, self.kv_a_weight).tensor_split([R], dim=-1)
        return angles.assemble(q, _norm(c, self.kv_a_norm_weight, eps), k, self.num_heads)


@composite("mla_project")
def _mla_project_composite(
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
    inputs = _Inputs(
        hidden, q_a_weight, q_b_weight, kv_a_weight, cos, sin, positions, num_heads,
        q_a_norm_weight, kv_a_norm_weight, norm_eps,
    )  # fmt: skip
    inputs.check(Check("mla_project"))
    return inputs.project()


@composite("mla_project_training")
def _mla_project_training_composite(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _Inputs(*arguments)
    inputs.check(Check("mla_project"))
    c_q = inputs.query_latent(inputs.hidden)
    return (*inputs.project(c_q), c_q)


@composite("mla_project_append")
def _mla_project_append_composite(
    hidden: Tensor,
    q_a_weight: Tensor | None,
    q_b_weight: Tensor,
    kv_a_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_heads: int,
    cache: Tensor,
    slot_mapping: Tensor,
    q_a_norm_weight: Tensor | None = None,
    kv_a_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    input_norm_weight: Tensor | None = None,
    input_norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(
        hidden, q_a_weight, q_b_weight, kv_a_weight, cos, sin, positions, num_heads,
        q_a_norm_weight, kv_a_norm_weight, norm_eps, input_norm_weight, input_norm_eps,
    )  # fmt: skip
    check = Check("mla_project_append")
    inputs.check(check)
    check.like("cache", cache, hidden, "hidden")
    check.shape("cache", cache, (-1, -1, kv_a_weight.size(0)), "[pages, page, R + E]")
    check.separate_rows("cache", cache)
    check.dtype("slot_mapping", slot_mapping, torch.int64)
    check.same_device("slot_mapping", slot_mapping, hidden)
    check.shape("slot_mapping", slot_mapping, tuple(hidden.shape[:2]), "[B, T]")
    q, latent = inputs.project()
    append_rows(latent, cache, slot_mapping)
    return q, latent


def append_rows(latent: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write latents [B, T, R + E] to their slots [B, T] of a paged cache; -1 = not stored."""
    if cache.size(0) == 0 or latent.numel() == 0:
        return
    # Shapes may not depend on values, so every row is written somewhere: one that is not stored
    # repeats the write of the first that is (the same value into the same slot), and where none is
    # stored, all write back what slot 0 holds.
    slots, rows = slot_mapping.flatten(), latent.flatten(0, 1)
    stored = slots >= 0
    own = torch.arange(slots.numel(), device=slots.device)
    source = torch.where(stored, own, stored.int().argmax())
    slot = slots[source].clamp(min=0)
    page, offset = slot // cache.size(1), slot % cache.size(1)
    cache[page, offset] = torch.where(stored.any(), rows[source], cache[page, offset])


@composite("mla_project_backward")
def _mla_project_backward_composite(
    dq: Tensor,
    dlatent: Tensor,
    hidden: Tensor,
    q_a_weight: Tensor | None,
    q_b_weight: Tensor,
    kv_a_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_heads: int,
    q_a_norm_weight: Tensor | None,
    kv_a_norm_weight: Tensor | None,
    norm_eps: float,
    c_q: Tensor | None = None,
) -> tuple[Tensor, ...]:
    back = Angles(cos[positions], -sin[positions])  # a rotation's transpose turns the other way
    x = hidden.flatten(0, 1)
    if c_q is None:
        c_q = x if q_a_weight is None else F.linear(x, q_a_weight)
    c_q = c_q.reshape(x.size(0), -1)
    dq_raw = back.rotate(dq).flatten(2).flatten(0, 1)
    dkv_raw = back.rotate(dlatent).flatten(0, 1)
    dkv_a_norm = x.new_empty(0)
    if kv_a_norm_weight is not None:
        R = kv_a_norm_weight.size(0)
        c = F.linear(x, kv_a_weight[:R])
        dc, dkv_a_norm = _norm_backward(dkv_raw[:, :R], c, kv_a_norm_weight, norm_eps)
        dkv_raw = torch.cat((dc, dkv_raw[:, R:]), dim=-1)
    dq_b = dq_raw.t() @ _norm(c_q, q_a_norm_weight, norm_eps)
    dkv_a = dkv_raw.t() @ x
    dc_q, dq_a_norm = _norm_backward(dq_raw @ q_b_weight, c_q, q_a_norm_weight, norm_eps)
    dx, dq_a = dc_q, x.new_empty(0)
    if q_a_weight is not None:
        dx, dq_a = dc_q @ q_a_weight, dc_q.t() @ x
    dx = torch.addmm(dx, dkv_raw, kv_a_weight).view(hidden.shape)
    return dx, dq_a, dq_b, dkv_a, dq_a_norm, dkv_a_norm


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.num_heads = inputs[:7], inputs[7]
    q_a_norm_weight, kv_a_norm_weight, ctx.norm_eps = inputs[8:]
    kept = output[2:]  # c_q, where it is an output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    c_q = kept[0] if kept else None
    ctx.save_for_backward(*tensors, q_a_norm_weight, kv_a_norm_weight, c_q)


def _backward(
    ctx: Any, dq: Tensor | None, dlatent: Tensor | None, _dc_q: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    *inputs, q_a_norm, kv_a_norm, c_q = ctx.saved_tensors
    hidden, q_a, q_b, kv_a = inputs[:4]
    tokens, heads = hidden.shape[:2], ctx.num_heads
    dq = hidden.new_zeros(*tokens, heads, q_b.size(0) // heads) if dq is None else dq
    dlatent = hidden.new_zeros(*tokens, kv_a.size(0)) if dlatent is None else dlatent
    dx, dq_a, dq_b, dkv_a, dq_a_norm, dkv_a_norm = torch.ops.zebra.mla_project_backward(
        dq, dlatent, *inputs, heads, q_a_norm, kv_a_norm, ctx.norm_eps, c_q
    )
    dq_a = optional(dq_a, q_a)
    dq_a_norm, dkv_a_norm = optional(dq_a_norm, q_a_norm), optional(dkv_a_norm, kv_a_norm)
    return dx, dq_a, dq_b, dkv_a, None, None, None, None, dq_a_norm, dkv_a_norm, None


autograd("mla_project", _backward, _setup)
autograd("mla_project_training", _backward, _setup)
