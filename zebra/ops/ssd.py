"""The state-space recurrence of Mamba-2 (SSD) over whole sequences, gate and norm fused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zebra.ops import reference
from zebra.ops._check import Check, acc_dtype
from zebra.ops._register import autograd, composite, differentiable, fake, optional

_CHUNK = 64  # tokens of the composite's chunks


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
    """Scan a state-space recurrence with scalar decay per head; gate and normalise its output.

    Equation:
        d = softplus(dt + dt_bias);  S_t = exp(A d_t) S_{t-1} + d_t x_t B_t^T;
        y_t = S_t C_t + D x_t;  with z: u = y * silu(z);
        with norm_weight: w * u / sqrt(mean_P(u^2) + eps), per head   (Dao and Gu 2024, eq. 1 and 2)

    Heads are shared in order: head h reads x[:, :, h // (H / Gx)], and likewise B and C.  H is a
    multiple of each of Gx, Gb and Gc; the kernels never form the repeated tensors.

    On CUDA, bfloat16 and float16 run in a kernel for P and N of 64 or 128 each; float32, of any P
    and N, and all gradients are composites of PyTorch operations.

    Args:
        x: [B, T, Gx, P] float32, bfloat16 or float16 (float64 on the CPU).  x, dt, B, C and z may
            be views with any strides whose last dimension is contiguous; the CUDA kernel also needs
            x, B, C and z 16-byte aligned, their strides multiples of 8.
        dt: [B, T, H] of x's dtype or float32, the step before bias and softplus.
        A: [H] float32 (float64 with float64 x), <= 0.
        B: [B, T, Gb, N] like x.
        C: [B, T, Gc, N] like x.
        D: [H] of x's dtype or float32, or None.
        z: [B, T, H, P] like x, the gate, or None.
        dt_bias: [H] of x's dtype or float32, or None.
        norm_weight: [H * P] of x's dtype or float32, or None; needs z.
        initial_state: [B, H, P, N] float32 (float64 with float64 x), or [n_seq, H, P, N] with
            cu_seqlens; None: zeros.
        cu_seqlens: [n_seq + 1] int32, the bounds of packed sequences (B = 1), or None.
        dt_softplus: False takes dt + dt_bias as the step itself.
        norm_eps: added to the mean square of the norm.

    Returns:
        y [B, T, H, P] of x's dtype and the states after each sequence, like initial_state.

    Raises:
        RuntimeError: on a wrong shape, dtype or device, or where the CUDA kernel does not take P, N
            or an alignment; on the CPU also where A > 0 or where cu_seqlens does not rise from 0
            to T.

    Numerics:
        Products and states in fp32 (fp64 for fp64), decays as exp of non-positive sums that restart
        every 64 tokens; one rounding of y.  Results below the smallest normal number become 0.
        The CUDA kernel rounds the operands of its matrix products (decayed scores, decayed x and,
        for reading, the state) to x's dtype; sums and the carried state are fp32.  In float16 a
        state beyond 65504 then overflows and decayed scores below 6e-8 are lost.
        Deterministic, the gradients included, and independent of how sequences are packed; on
        Hopper (sm_90) long sequences are cut into segments by the shape of the batch, which can
        change last digits, or with ZEBRA_BATCH_INVARIANT=1 every 2048 tokens whatever it is.  A NaN
        stays in its sequence and reaches later tokens only (on CUDA: the tokens of its chunk of 64
        too).
    """
    y, state = torch.ops.zebra.ssd_scan(
        x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state, cu_seqlens, dt_softplus, norm_eps
    )
    return y, state


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


@fake("ssd_scan")
def _ssd_scan_fake(
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
    heads, P = A.size(0), x.size(3)
    sequences = x.size(0) if cu_seqlens is None else cu_seqlens.size(0) - 1
    y = x.new_empty(x.size(0), x.size(1), heads, P)
    return y, x.new_empty(sequences, heads, P, B.size(3), dtype=acc_dtype(x))


@fake("ssd_scan_backward")
def _ssd_scan_backward_fake(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    inputs = (x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """csrc/ssd_scan/ssd_scan_torch.h, without the values of A and cu_seqlens."""
    check = Check("ssd_scan")

    def grouped(name: str, t: Tensor, legend: str) -> None:
        check.shape(name, t, (*x.shape[:2], -1, -1), legend)
        check.like(name, t, x, "x")
        ok = t.size(2) > 0 and H % t.size(2) == 0
        check.that(ok, name, t, "of a number of heads that divides H = ", H)
        check.that(t.size(3) > 0, name, t, "non-empty in its last dimension")
        check.last_dim_contiguous(name, t)

    def vector(name: str, t: Tensor | None, size: int, legend: str) -> None:
        if t is not None:
            check.shape(name, t, (size,), legend)
            check.parameter(name, t, x)

    check.shape("x", x, (-1, -1, -1, -1), "[B, T, Gx, P]")
    check.floating("x", x)
    check.shape("A", A, (-1,), "[H]")
    H, P, tokens = A.size(0), x.size(3), tuple(x.shape[:2])
    check.that(H > 0, "A", A, "of at least one head")
    check.dtype("A", A, acc_dtype(x))
    check.same_device("A", A, x)
    check.contiguous("A", A)
    grouped("x", x, "[B, T, Gx, P]")
    grouped("B", B, "[B, T, Gb, N]")
    grouped("C", C, "[B, T, Gc, N]")
    check.shape("C", C, (*tokens, C.size(2), B.size(3)), "[B, T, Gc, N]")
    check.shape("dt", dt, (*tokens, H), "[B, T, H]")
    check.floating("dt", dt)
    ok = dt.dtype in (x.dtype, torch.float32)
    check.that(ok, "dt", dt, x.dtype, " like x, or float32")
    check.same_device("dt", dt, x)
    check.last_dim_contiguous("dt", dt)
    vector("D", D, H, "[H]")
    vector("dt_bias", dt_bias, H, "[H]")
    if z is not None:
        check.shape("z", z, (*tokens, H, P), "[B, T, H, P]")
        check.like("z", z, x, "x")
        check.last_dim_contiguous("z", z)
    vector("norm_weight", norm_weight, H * P, "[H * P]")
    ok = norm_weight is None or z is not None
    check.that(ok, "z", z, "given with norm_weight (the norm follows the gate)")
    sequences, legend = x.size(0), "[B, H, P, N]"
    if cu_seqlens is not None:
        sequences = check.cu_seqlens(cu_seqlens, x, "x", "[1, T, Gx, P]")
        legend = "[n_seq, H, P, N]"
    if initial_state is not None:
        check.shape("initial_state", initial_state, (sequences, H, P, B.size(3)), legend)
        check.dtype("initial_state", initial_state, acc_dtype(x))
        check.same_device("initial_state", initial_state, x)


class _Chunks(NamedTuple):
    """Where the tokens of each chunk lie: sequences are cut from their own start.

    All shapes follow from shapes: packed sequences get T // Q + n_seq chunks, of which the last
    ones may be empty, so nothing waits for the values of cu_seqlens.
    """

    token: Tensor  # [chunks * Q] token of each place, clamped
    valid: Tensor  # [chunks * Q, 1, 1] whether a token is there
    place: Tensor  # [T] place of each token
    sequence: Tensor  # [chunks] sequence of each chunk
    starts: Tensor  # [chunks, 1, 1, 1] whether the chunk is the first of its sequence
    last: Tensor  # [n_seq] last chunk of each sequence, clamped
    empty: Tensor  # [n_seq, 1, 1, 1] whether the sequence has no tokens


def _cut(cu_seqlens: Tensor, tokens: int, chunk: int) -> _Chunks:
    cu = cu_seqlens.long()
    sequences = cu.numel() - 1
    chunks = tokens // chunk + sequences
    count = (cu.diff() + (chunk - 1)) // chunk
    end = count.cumsum(0)  # one past the last chunk of each sequence
    c = torch.arange(chunks, device=cu.device)
    sequence = torch.searchsorted(end, c, right=True).clamp(max=sequences - 1)
    inside = c - (end - count)[sequence]
    token = cu[sequence, None] + inside[:, None] * chunk + torch.arange(chunk, device=cu.device)
    valid = token < cu[sequence + 1, None]
    t = torch.arange(tokens, device=cu.device)
    of = torch.searchsorted(cu[1:], t, right=True)
    place = (end - count)[of] * chunk + t - cu[of]
    return _Chunks(
        token.clamp(max=tokens - 1).flatten(),
        valid.flatten()[:, None, None],
        place,
        sequence,
        (inside == 0)[:, None, None, None],
        (end - 1).clamp(min=0),
        (count == 0)[:, None, None, None],
    )


def _chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    norm_eps: float,
    chunk: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """The operator in differentiable PyTorch operations, chunk by chunk; shapes as ssd_scan."""
    batch, tokens, heads, P, N = x.size(0), x.size(1), A.size(0), x.size(3), B.size(3)
    sequences = batch if cu_seqlens is None else cu_seqlens.size(0) - 1
    first = (
        x.new_zeros(sequences, heads, P, N, dtype=acc_dtype(x))
        if initial_state is None
        else initial_state.clone()
    )
    if tokens == 0 or sequences == 0:
        return x.new_empty(batch, tokens, heads, P), first
    d = _wide(dt) if dt_bias is None else _wide(dt) + _wide(dt_bias)
    d = F.softplus(d) if dt_softplus else d
    cut = None if cu_seqlens is None else _cut(cu_seqlens, tokens, chunk)

    def chunks_of(t: Tensor) -> Tensor:  # [B, T, heads, k] to [B, chunks, heads, Q, k]
        if cut is None:
            t = F.pad(t, (0, 0, 0, 0, 0, -tokens % chunk))
        else:
            t = torch.where(cut.valid, t[0, cut.token], 0)[None]
        t = t.unflatten(1, (-1, chunk)).transpose(2, 3)
        return t.repeat_interleave(heads // t.size(2), dim=2)

    xw = _wide(x)
    xs, Bs, Cs = chunks_of(xw), chunks_of(_wide(B)), chunks_of(_wide(C))
    step = chunks_of(d[..., None])
    s = (step.squeeze(-1).double() * A.double()[:, None]).cumsum(-1)  # [B, chunks, H, Q]
    # In fp64: s_i - s_j after a huge step, and the row and column sums that are its gradient.
    pairs = (s[..., :, None] - s[..., None, :]).to(xs.dtype)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    scores = (Cs @ Bs.mT) * pairs.masked_fill(later, float("-inf")).exp()
    dx = step * xs
    y = scores.masked_fill(later, 0) @ dx
    updates = ((s[..., -1:] - s).exp().to(xs.dtype)[..., None] * dx).mT @ Bs  # [B, chunks, H, P, N]
    whole = s[..., -1].exp().to(xs.dtype)[..., None, None]
    before, after = [], []
    state = first if cut is None else first[:1]
    for c in range(xs.size(1)):
        if cut is not None:
            state = torch.where(cut.starts[c], first[cut.sequence[c : c + 1]], state)
        before.append(state)
        state = whole[:, c] * state + updates[:, c]
        after.append(state)
    if cut is not None:
        state = torch.where(cut.empty, first, torch.cat(after)[cut.last])
    decayed = s.exp().to(xs.dtype)[..., None] * Cs
    y = (y + decayed @ torch.stack(before, 1).mT).transpose(2, 3).flatten(1, 2)
    y = y[:, :tokens] if cut is None else y[:, cut.place]
    if D is not None:
        y = y + _wide(D)[:, None] * xw.repeat_interleave(heads // x.size(2), dim=2)
    return reference.gated_norm(y, z, norm_weight, norm_eps).to(x.dtype), state


@composite("ssd_scan", beside_kernel="_ssd_scan_composite")
def _ssd_scan_composite(
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
    _check(x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state, cu_seqlens)
    y, state = _chunked_scan(
        x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state, cu_seqlens, dt_softplus, norm_eps
    )
    return y.contiguous(), state.contiguous()


@composite("ssd_scan_backward")
def _ssd_scan_backward_composite(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    given = (x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state)
    with differentiable():
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in given]
        x_, dt_, A_, B_, C_, D_, z_, b_, w_, s_ = leaves
        outputs = _chunked_scan(
            x_, dt_, A_, B_, C_, D_, z_, b_, w_, s_, cu_seqlens, dt_softplus, norm_eps
        )
    wanted = [t for t in leaves if t is not None]
    pairs = [(o, g) for o, g in zip(outputs, (dy, dfinal_state), strict=True) if g is not None]
    grads = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True
        )
    )
    return tuple(x.new_empty(0) if t is None else next(grads).contiguous() for t in leaves)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.dt_softplus, ctx.norm_eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    x, A = inputs[0], inputs[2]
    if dy is None:  # only the state was used
        dy = x.new_zeros(x.size(0), x.size(1), A.size(0), x.size(3))
    grads = torch.ops.zebra.ssd_scan_backward(
        dy, dfinal_state, *inputs, ctx.dt_softplus, ctx.norm_eps
    )
    return (*(optional(g, t) for g, t in zip(grads, inputs, strict=False)), None, None, None)


autograd("ssd_scan", _backward, _setup)
