"""The Mamba2 mixer in the shape of grouped-query attention: training, prefill and decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zebra import ops
from zebra.layers.dtypes import wide
from zebra.layers.linear import decode_linear
from zebra.layers.norm import RMSNorm


class Mamba2Mixer(nn.Module):
    """A selective state space whose x, B and C stand where V, K and Q stood in attention.

    [z | x | B | C | dt] = W_in u;  x, B, C = silu(conv1d(x, B, C))
    d = softplus(dt + dt_bias);  S_t = exp(A d_t) S_{t-1} + d_t x_t B_t^T;  y_t = S_t C_t + D x_t
    out = W_out RMSNorm_head(y * silu(z)),  A = -exp(A_log)

    x and B have num_kv_heads heads, z, C and dt have num_heads; head h reads x and B of head
    h // (num_heads / num_kv_heads).

    Args:
        hidden_size: Width of the input and output.
        num_heads: SSM heads H.
        head_dim: Channels per head P.
        state_size: State channels per head N.
        num_kv_heads: Heads G of x and B; divides num_heads.  None means num_heads.
        conv_width: Taps of the causal convolution.
        norm_eps: eps of the gated per-head RMSNorm.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        state_size: int,
        num_kv_heads: int | None = None,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % groups:
            raise ValueError(
                f"Mamba2Mixer: num_heads must be a multiple of num_kv_heads, "
                f"got {num_heads} and {groups}"
            )
        self.num_heads, self.head_dim, self.state_size = num_heads, head_dim, state_size
        self.num_kv_heads, self.conv_width, self.norm_eps = groups, conv_width, norm_eps
        self.d_inner = num_heads * head_dim
        self.conv_dim = groups * (head_dim + state_size) + num_heads * state_size
        self.in_proj = nn.Linear(hidden_size, self.d_inner + self.conv_dim + num_heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, conv_width, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        self.norm = HeadNormWeight(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, hidden_size, bias=False)
        self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw dt_bias, A_log and D; the linear maps keep PyTorch's own start."""
        drawn = draw_ssm_parameters(self.num_heads, generator)
        for parameter, value in zip((self.dt_bias, self.A_log, self.D), drawn, strict=True):
            parameter.copy_(value)

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor | None = None,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix full sequences, continuing from the given states.

        Args:
            hidden: [B, T, hidden_size], or [1, total, hidden_size] with cu_seqlens.
            cu_seqlens: [n_seq + 1] int32 bounds of packed sequences.
            conv_state: [B or n_seq, conv_dim, conv_width - 1]; None = zeros.
            ssm_state: [B or n_seq, H, P, N]; None = zeros.

        Returns:
            Output [B, T, hidden_size], the last conv state, the last SSM state (fp32).
        """
        zxbcdt = self.in_proj(hidden)
        z, xbc, dt = zxbcdt.split([self.d_inner, self.conv_dim, self.num_heads], dim=-1)
        weight, bias, norm_weight = self._weights(xbc.dtype)
        xbc, conv_state = ops.causal_conv1d(
            xbc, weight, bias, initial_state=conv_state, cu_seqlens=cu_seqlens
        )
        H, G, P, N = self.num_heads, self.num_kv_heads, self.head_dim, self.state_size
        x, B, C = xbc.split([G * P, G * N, H * N], dim=-1)
        if z.is_cuda and H % 8 != 0:  # rows that the CUDA kernel cannot read in 16-byte units
            z = z.contiguous()
        y, ssm_state = ops.ssd_scan(
            x.unflatten(-1, (G, P)),
            dt,
            self._A(),
            B.unflatten(-1, (G, N)),
            C.unflatten(-1, (H, N)),
            D=wide(self.D),
            z=z.unflatten(-1, (H, P)),
            dt_bias=wide(self.dt_bias),
            norm_weight=norm_weight,
            initial_state=None if ssm_state is None else wide(ssm_state),
            cu_seqlens=cu_seqlens,
            norm_eps=self.norm_eps,
        )
        out: Tensor = self.out_proj(y.flatten(2))
        return out, conv_state, ssm_state

    def step(
        self,
        hidden: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        state_indices: Tensor | None = None,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Mix one token of every sequence, updating its states in place.

        Args:
            hidden: [B, 1, hidden_size].
            conv_state: [slots, conv_dim, conv_width - 1] (mutated).
            ssm_state: [slots, H, P, N] (mutated).
            state_indices: [B] int32, slot of each row, -1 = padding row; None = row i is slot i.
            norm: Applied to hidden first.
            residual: [B, 1, hidden_size], added to the result.

        Returns:
            [B, 1, hidden_size].

        Raises:
            ValueError: If hidden holds more than one token a sequence.
        """
        if hidden.dim() != 3 or hidden.size(1) != 1:
            raise ValueError(
                f"Mamba2Mixer.step: hidden must be [B, 1, hidden_size], got {list(hidden.shape)}"
            )
        zxbcdt = decode_linear(self.in_proj, hidden[:, 0], norm)
        weight, bias, norm_weight = self._weights(zxbcdt.dtype)
        y = ops.mamba2_step(
            zxbcdt,
            conv_state,
            ssm_state,
            weight,
            bias,
            wide(self.dt_bias),
            wide(self.A_log),
            wide(self.D),
            norm_weight,
            self.num_kv_heads,
            state_indices=state_indices,
            norm_eps=self.norm_eps,
            A_is_log=True,
        )
        return decode_linear(self.out_proj, y[:, None], residual=residual)

    def _A(self) -> Tensor:
        return -torch.exp(wide(self.A_log))

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Conv taps [C, W], conv bias and norm weight in the activations' dtype (see autocast)."""
        taps, bias, norm = self.conv1d.weight[:, 0], self.conv1d.bias, self.norm.weight
        assert bias is not None
        return taps.to(dtype), bias.to(dtype), norm.to(dtype)


class HeadNormWeight(nn.Module):
    """Holds the weight of the gated per-head RMSNorm, which ssd_scan and mamba2_step apply."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def draw_ssm_parameters(
    num_heads: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw dt_bias, A_log and D [num_heads] fp32 on the CPU, as Mamba-2 does.

    dt_bias = softplus^-1(dt), dt log-uniform in [1e-3, 1e-1];  A uniform in [1, 16];  D = 1.
    """
    dt = torch.empty(num_heads, device="cpu")
    dt.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_().clamp_(min=1e-4)
    A = torch.empty(num_heads, device="cpu").uniform_(1, 16, generator=generator)
    return dt + torch.log(-torch.expm1(-dt)), A.log(), torch.ones(num_heads, device="cpu")
