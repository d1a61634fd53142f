"""Causal depthwise convolution of a sequence, its gradient, and its one-token step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zebra.ops._register import autograd, fake, optional


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
        conv_state: [slots, C, W-1] like x, contiguous in its last two dimensions; changed in place.
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
