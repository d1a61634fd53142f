"""One decoding step of a Mamba2 mixer, between its input and output projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zebra.ops import reference
from zebra.ops._check import Check, acc_dtype
from zebra.ops._register import composite, fake


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
    A_is_log: bool = False,
) -> Tensor:
    """One token of a Mamba2 mixer: convolution, state update, gate and per-head norm, in one pass.

    Equation:
        [x | B | C] = silu(conv(conv_state, [x | B | C]));  d = softplus(dt + dt_bias)
        S = exp(A d) S + d x B^T;  y = S C + D x            (Dao and Gu 2024, the recurrent form)
        u = y * silu(z);  y = norm_weight * u / sqrt(mean_P(u^2) + norm_eps)

    Args:
        zxbcdt: [B, d_in_proj] float32, bfloat16 or float16 (float64 on the CPU); each row is
            z (H*P) | x (G*P) | B (G*N) | C (H*N) | dt (H); the row stride may exceed d_in_proj.
        conv_state: [slots, C, W-1] of zxbcdt's dtype, oldest token first; updated in place.
            C = G*(P + N) + H*N channels in the order x | B | C.  Slots may lie further apart than
            their size.
        ssm_state: [slots, H, P, N] float32 (recommended), or zxbcdt's dtype; updated in place.
        conv_weight: [C, W] of zxbcdt's dtype or float32, as the other parameters but A.
        conv_bias: [C] or None.
        dt_bias: [H], added to dt before the softplus.
        A: [H] float32 (float64 for float64), not positive; or its logarithm, see A_is_log.
        D: [H], the skip connection.
        norm_weight: [H*P], or None for no norm.
        n_groups: G, the KV heads of x and B; divides H.
        state_indices: [B] int32, the slot of each row; negative for a padding row, whose y is 0 and
            which touches no state.  Slots must be distinct.  None: row b uses slot b.
        norm_eps: added to the mean square.
        A_is_log: A holds log(-A), as models keep it.

    Returns:
        y [B, H*P] of zxbcdt's dtype.  Inference only: the result carries no gradient history, also
        where an argument requires grad (train with :func:`causal_conv1d` and :func:`ssd_scan`).

    Raises:
        RuntimeError: on a wrong shape, dtype, stride or device; on the CPU also where A is positive
            and where state_indices repeat a slot or exceed the slots.  Nothing is written then.
            CUDA does not read these values on the host: a row whose slot does not exist gives NaN
            and touches no state.

    Numerics:
        Everything in fp32 (fp64 for fp64), with one rounding of y and one of each stored state.  A
        16-bit ssm_state rounds once a token, so its error grows where A d is small; float32 does
        not.  Deterministic.
    """
    with torch.no_grad():
        return torch.ops.zebra.mamba2_step(
            zxbcdt,
            conv_state,
            ssm_state,
            conv_weight,
            conv_bias,
            dt_bias,
            A,
            D,
            norm_weight,
            n_groups,
            state_indices,
            norm_eps,
            A_is_log,
        )


@fake("mamba2_step")
def _mamba2_step_fake(
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
    A_is_log: bool = False,
) -> Tensor:
    return zxbcdt.new_empty(zxbcdt.size(0), ssm_state.size(1) * ssm_state.size(2))


def _write_slots(state: Tensor, slots: Tensor, live: Tensor, value: Tensor) -> None:
    """state[slots[b]] = value[b] for the live rows b, without reading anything on the host.

    A padding row repeats the write of the first live row, so that rows that meet in one slot always
    carry the same value.  Without any live row, all of them write back what slot 0 holds.
    """
    first = live.int().argmax()
    row = torch.where(live, torch.arange(live.size(0), device=live.device), first)
    state.index_copy_(0, slots[row], value[row])


def _check(
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
    state_indices: Tensor | None,
) -> None:
    """csrc/mamba2_step/mamba2_step_torch.h, without the values of A and state_indices."""
    check, acc = Check("mamba2_step"), acc_dtype(zxbcdt)

    def parameter(name: str, t: Tensor | None, sizes: tuple[int, ...], legend: str) -> None:
        if t is None:
            return
        check.shape(name, t, sizes, legend)
        ok = t.dtype in (zxbcdt.dtype, acc)
        check.that(ok, name, t, zxbcdt.dtype, " like zxbcdt, or ", acc)
        check.same_device(name, t, zxbcdt)
        check.contiguous(name, t)

    check.shape("ssm_state", ssm_state, (-1, -1, -1, -1), "[slots, H, P, N]")
    slots, H, P, N = ssm_state.shape
    ok = H > 0 and P > 0 and N > 0
    check.that(ok, "ssm_state", ssm_state, "[slots, H, P, N] with H, P, N > 0")
    G = n_groups
    check.that(G > 0 and H % G == 0, "n_groups", G, "a divisor of H = ", H)
    channels = G * (P + N) + H * N
    ok = conv_weight.dim() == 2 and conv_weight.size(1) > 0
    check.that(ok, "conv_weight", conv_weight, "[C, W] with W > 0")
    W = conv_weight.size(1)

    check.floating("zxbcdt", zxbcdt)
    row = "[B, H P + G (P + N) + H N + H]"
    check.shape("zxbcdt", zxbcdt, (-1, H * P + channels + H), row)
    check.last_dim_contiguous("zxbcdt", zxbcdt)
    batch = zxbcdt.size(0)

    check.like("conv_state", conv_state, zxbcdt, "zxbcdt")
    check.shape("conv_state", conv_state, (slots, channels, W - 1), "[slots, C, W-1]")
    check.slots("conv_state", conv_state)
    ok = ssm_state.dtype in (zxbcdt.dtype, acc)
    check.that(ok, "ssm_state", ssm_state, acc, " or ", zxbcdt.dtype, " like zxbcdt")
    check.same_device("ssm_state", ssm_state, zxbcdt)
    check.slots("ssm_state", ssm_state)

    parameter("conv_weight", conv_weight, (channels, W), "[C, W]")
    parameter("conv_bias", conv_bias, (channels,), "[C]")
    parameter("dt_bias", dt_bias, (H,), "[H]")
    parameter("D", D, (H,), "[H]")
    parameter("norm_weight", norm_weight, (H * P,), "[H P]")
    check.shape("A", A, (H,), "[H]")
    check.dtype("A", A, acc)
    check.same_device("A", A, zxbcdt)
    check.contiguous("A", A)

    if state_indices is None:
        want = ("[slots, H, P, N] with slots >= B = ", batch)
        absent = " where state_indices is not given"
        check.that(slots >= batch, "ssm_state", ssm_state, *want, absent)
    else:
        check.shape("state_indices", state_indices, (batch,), "[B]")
        check.dtype("state_indices", state_indices, torch.int32)
        check.same_device("state_indices", state_indices, zxbcdt)
        check.contiguous("state_indices", state_indices)


@composite("mamba2_step")
def _mamba2_step_composite(
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
    A_is_log: bool = False,
) -> Tensor:
    weights = (conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    _check(zxbcdt, conv_state, ssm_state, *weights, n_groups, state_indices)
    batch, (_, H, P, N), G = zxbcdt.size(0), ssm_state.shape, n_groups
    A = -torch.exp(A) if A_is_log else A
    if batch == 0:
        return zxbcdt.new_empty(0, H * P)
    if state_indices is None:
        slots = torch.arange(batch, device=zxbcdt.device)
        live = torch.ones_like(slots, dtype=torch.bool)
    else:
        slots, live = state_indices.long().clamp(min=0), state_indices >= 0
    acc = A.dtype
    z, xbc, dt = zxbcdt.split([H * P, G * (P + N) + H * N, H], dim=-1)

    window = torch.cat((conv_state[slots], xbc[:, :, None]), dim=-1)  # [B, C, W]
    conv = (window.to(acc) * conv_weight.to(acc)).sum(-1)
    conv = F.silu(conv if conv_bias is None else conv + conv_bias.to(acc))
    x, Bt, Ct = conv.split([G * P, G * N, H * N], dim=-1)
    x = x.view(batch, G, 1, P).expand(-1, -1, H // G, -1).reshape(batch, H, P)
    Bt = Bt.view(batch, G, 1, N).expand(-1, -1, H // G, -1).reshape(batch, H, N)

    d = F.softplus(dt.to(acc) + dt_bias.to(acc))  # [B, H]
    old = ssm_state[slots]
    update = (d[:, :, None] * x)[..., None] * Bt[:, :, None, :]
    state = torch.exp(d * A)[:, :, None, None] * old.to(acc) + update
    y = torch.matmul(state, Ct.view(batch, H, N, 1))[..., 0] + D.to(acc)[:, None] * x
    y = reference.gated_norm(y, z.to(acc).view(batch, H, P), norm_weight, norm_eps)

    alive = live[:, None, None]
    _write_slots(conv_state, slots, live, torch.where(alive, window[:, :, 1:], window[:, :, :-1]))
    _write_slots(
        ssm_state, slots, live, torch.where(alive[..., None], state.to(ssm_state.dtype), old)
    )
    return torch.where(live[:, None], y.reshape(batch, H * P), 0.0).to(zxbcdt.dtype)
