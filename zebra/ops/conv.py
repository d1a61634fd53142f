"""Causal depthwise convolution of a sequence, its gradient, and its one-token step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zebra.ops._check import Check
from zebra.ops._register import autograd, composite, fake, optional


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution along tokens, channels last, with an optional SiLU.

    Equation:
        y[t, c] = act(bias[c] + sum_w weight[c, w] x[t - (W-1) + w, c]);  rows of x before the
        first token of a sequence are its initial state, or zero.

    Args:
        x: [B, T, C] float32, bfloat16 or float16 (float64 on the CPU), contiguous in C.  Token and
            batch strides are free: x may be a view into wider rows.
        weight: [C, W] with W 2, 3 or 4, of x's dtype or float32, contiguous.
        bias: [C] of x's dtype or float32, or None.
        initial_state: [B, C, W-1] (packed: [n_seq, C, W-1]) like x, oldest row first, or None.
        cu_seqlens: [n_seq + 1] int32: x is packed, B is 1, and sequence i holds the tokens
            cu_seqlens[i] to cu_seqlens[i + 1]; sequences may be empty.  On a GPU the values are not
            checked (that would wait for the GPU); wrong ones give wrong rows, never a wrong access.
        activation: "silu" or "none".

    Returns:
        y [B, T, C] like x, contiguous, and the final state [.., C, W-1]: the last W-1 rows of x,
        which continue a sequence as the next call's ``initial_state``.

    Raises:
        RuntimeError: on a wrong shape, dtype or device, and on the CPU where cu_seqlens does not
            start at 0, decreases, or does not end at T.

    Numerics:
        fp32 arithmetic (fp64 for fp64), one rounding to the output dtype.  Deterministic; gradients
        of weight and bias are fp32 sums in an order that depends on shapes only.
    """
    y, state = torch.ops.zebra.causal_conv1d(x, weight, bias, initial_state, cu_seqlens, activation)
    return y, state


def causal_conv1d_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of :func:`causal_conv1d` for every sequence of a decoding batch.

    Equation:
        full = [conv_state[s], x];  y = act(bias + sum_w weight[:, w] full[w]);
        conv_state[s] = full[1:]

    Args:
        x: [B, C], contiguous in C; rows may be views into wider rows.
        conv_state: [slots, C, W-1] like x, changed in place; slots contiguous, none overlapping.
        weight: [C, W] with W 2, 3 or 4, of x's dtype or float32, contiguous.
        bias: [C] of x's dtype or float32, or None.
        activation: "silu" or "none".
        state_indices: [B] int32 slot of every row; -1 is a padding row: its y is 0 and no state
            changes.  None: row i uses slot i.  Slots must differ; two rows with one slot race.

    Returns:
        y [B, C] like x.

    Raises:
        RuntimeError: on a wrong shape, dtype or device, and on the CPU on an index >= slots (on a
            GPU such a row is NaN and no state changes).

    Numerics:
        As :func:`causal_conv1d`.
    """
    return torch.ops.zebra.causal_conv1d_step(
        x, conv_state, weight, bias, activation, state_indices
    )


@fake("causal_conv1d")
def _causal_conv1d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    sequences = x.size(0) if cu_seqlens is None else cu_seqlens.size(0) - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.size(2), weight.size(1) - 1)


@fake("causal_conv1d_backward")
def _causal_conv1d_backward_fake(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dstate = x.new_empty(0 if initial_state is None else initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


@fake("causal_conv1d_step")
def _causal_conv1d_step_fake(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    state_indices: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


def _check_weights(
    check: Check, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> None:
    """Of both operators, csrc/causal_conv1d/causal_conv1d_torch.h."""
    channels = x.size(-1)
    check.floating("x", x)
    check.that(channels > 0, "x", x, "non-empty in its last dimension")
    check.last_dim_contiguous("x", x)
    check.shape("weight", weight, (channels, -1), "[C, W]")
    check.that(2 <= weight.size(1) <= 4, "weight", weight, "[C, W] with W 2, 3 or 4")
    check.parameter("weight", weight, x)
    if bias is not None:
        check.shape("bias", bias, (channels,), "[C]")
        check.parameter("bias", bias, x)
    known = activation in ("silu", "none")
    check.that(known, "activation", f"'{activation}'", "'silu' or 'none'")


def _check_sequences(
    check: Check,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    sequences, legend = x.size(0), "[B, C, W-1]"
    if cu_seqlens is not None:
        sequences = check.cu_seqlens(cu_seqlens, x, "x", "[1, T, C]")
        legend = "[n_seq, C, W-1]"
    if initial_state is not None:
        sizes = (sequences, x.size(2), weight.size(1) - 1)
        check.shape("initial_state", initial_state, sizes, legend)
        check.like("initial_state", initial_state, x, "x")


def _check_slots(
    check: Check, x: Tensor, conv_state: Tensor, weight: Tensor, state_indices: Tensor | None
) -> None:
    (batch, channels), taps = x.shape, weight.size(1) - 1
    check.shape("conv_state", conv_state, (-1, channels, taps), "[slots, C, W-1]")
    check.like("conv_state", conv_state, x, "x")
    check.slots("conv_state", conv_state)
    if state_indices is None:
        few = ("[slots, C, W-1] with at least B = ", batch)
        absent = " slots when there are no state_indices"
        check.that(conv_state.size(0) >= batch, "conv_state", conv_state, *few, absent)
    else:
        check.shape("state_indices", state_indices, (batch,), "[B]")
        check.dtype("state_indices", state_indices, torch.int32)
        check.same_device("state_indices", state_indices, x)
        check.contiguous("state_indices", state_indices)


# The composites index rows by token, so that packed sequences need no value on the host.


def _sequence_of(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence of every token [B, T], and the start and end token of every sequence."""
    batch, tokens = x.size(0), x.size(1)
    if cu_seqlens is not None:
        cu = cu_seqlens.long()
        t = torch.arange(tokens, device=x.device)
        seq = torch.searchsorted(cu[1:], t, right=True).clamp(max=cu.size(0) - 2)
        return seq[None], cu[:-1], cu[1:]
    start = torch.zeros(batch, dtype=torch.long, device=x.device)
    b = torch.arange(batch, device=x.device)
    return b[:, None].expand(batch, tokens), start, start + tokens


def _rows(x: Tensor, state: Tensor | None, seq: Tensor, row: Tensor, start: Tensor) -> Tensor:
    """Rows of sequences in fp32: x, or before the start the initial state, or zero.

    ``seq`` and ``row`` have one shape [..]; the result is [.., C].
    """
    first = start[seq]
    batch = torch.zeros_like(seq) if x.size(0) == 1 else seq
    rows = (
        x[batch, row.clamp(0, max(x.size(1) - 1, 0))]
        if x.size(1)
        else x.new_zeros(*row.shape, x.size(2))
    )
    if state is None:
        past = torch.zeros_like(rows)
    else:
        past = state[seq, :, (row - first + state.size(2)).clamp(0, state.size(2) - 1)]
    return torch.where((row >= first)[..., None], rows, past).float()


def _pre(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The value before the activation [B, T, C], and the W rows that each token reads."""
    width = weight.size(1)
    seq, start, _ = _sequence_of(x, cu_seqlens)
    t = torch.arange(x.size(1), device=x.device).expand_as(seq)
    taps = [_rows(x, state, seq, t - (width - 1) + k, start) for k in range(width)]
    pre = torch.zeros_like(taps[0]) if bias is None else bias.float().expand_as(taps[0])
    for k, tap in enumerate(taps):
        pre = pre + weight[:, k].float() * tap
    return pre, taps


@composite("causal_conv1d")
def _causal_conv1d_composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    check = Check("causal_conv1d")
    check.shape("x", x, (-1, -1, -1), "[B, T, C]")
    _check_weights(check, x, weight, bias, activation)
    _check_sequences(check, x, weight, initial_state, cu_seqlens)
    pre, _ = _pre(x, weight, bias, initial_state, cu_seqlens)
    y = F.silu(pre) if activation == "silu" else pre
    _, start, end = _sequence_of(x, cu_seqlens)
    taps = weight.size(1) - 1
    last = end[:, None] - taps + torch.arange(taps, device=x.device)
    seq = torch.arange(start.size(0), device=x.device)[:, None].expand_as(last)
    state = _rows(x, initial_state, seq, last, start).mT
    return y.to(x.dtype), state.to(x.dtype).contiguous()


@composite("causal_conv1d_backward")
def _causal_conv1d_backward_composite(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, tokens = weight.size(1), x.size(1)
    pre, taps = _pre(x, weight, bias, initial_state, cu_seqlens)
    g = dy.float()
    if activation == "silu":
        s = torch.sigmoid(pre)
        g = g * s * (1 + pre * (1 - s))
    dweight = torch.stack([(g * tap).sum((0, 1)) for tap in taps], 1).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else g.sum((0, 1)).to(bias.dtype)

    # A row of x or of the initial state receives weight[k] dpre from the token W-1-k later.
    seq, start, end = _sequence_of(x, cu_seqlens)

    def gather(seq: Tensor, row: Tensor) -> Tensor:
        total = torch.zeros(*row.shape, x.size(2), device=x.device)
        batch = torch.zeros_like(seq) if x.size(0) == 1 else seq
        for k in range(width) if tokens else ():
            t = row + (width - 1 - k)
            inside = ((t >= start[seq]) & (t < end[seq]))[..., None]
            dpre = g[batch, t.clamp(0, tokens - 1)]
            total = total + torch.where(inside, weight[:, k].float() * dpre, 0.0)
        if dfinal_state is not None:
            at = row - (end[seq] - (width - 1))
            from_state = dfinal_state[seq, :, at.clamp(0, width - 2)].float()
            total = total + torch.where((at >= 0)[..., None], from_state, 0.0)
        return total

    dx = gather(seq, torch.arange(tokens, device=x.device).expand_as(seq)).to(x.dtype)
    if initial_state is None:
        return dx, dweight, dbias, x.new_empty(0)
    row = start[:, None] - (width - 1) + torch.arange(width - 1, device=x.device)
    seq = torch.arange(start.size(0), device=x.device)[:, None].expand_as(row)
    return dx, dweight, dbias, gather(seq, row).mT.to(x.dtype).contiguous()


@composite("causal_conv1d_step")
def _causal_conv1d_step_composite(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    state_indices: Tensor | None = None,
) -> Tensor:
    check = Check("causal_conv1d_step")
    check.shape("x", x, (-1, -1), "[B, C]")
    _check_weights(check, x, weight, bias, activation)
    _check_slots(check, x, conv_state, weight, state_indices)
    if state_indices is None:
        slots = torch.arange(x.size(0), device=x.device)
    else:
        slots = state_indices.long()
    known = conv_state[slots.clamp(0, conv_state.size(0) - 1)]
    full = torch.cat([known, x[..., None]], -1)
    pre = (full.float() * weight.float()).sum(-1) + (0.0 if bias is None else bias.float())
    y = (F.silu(pre) if activation == "silu" else pre).to(x.dtype)
    # A padding row must write nowhere: every slot takes the row that names it, or keeps its own.
    hit = slots[None, :] == torch.arange(conv_state.size(0), device=x.device)[:, None]
    new = full[hit.to(torch.int8).argmax(1), :, 1:]
    conv_state.copy_(torch.where(hit.any(1)[:, None, None], new, conv_state))
    y = torch.where((slots < conv_state.size(0))[:, None], y, float("nan"))
    return torch.where((slots >= 0)[:, None], y, 0.0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    if dy is None:  # only the final state was used
        dy = x.new_zeros(x.shape)
    dx, dweight, dbias, dstate = torch.ops.zebra.causal_conv1d_backward(
        dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, ctx.activation
    )
    return dx, dweight, optional(dbias, bias), optional(dstate, initial_state), None, None


autograd("causal_conv1d", _backward, _setup)
