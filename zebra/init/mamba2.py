"""From grouped-query attention to Mamba2: V, K, Q and O become x, B, C and the output."""

from __future__ import annotations

import torch
from torch import Tensor

from zebra.layers.mamba2 import draw_ssm_parameters


def gqa_to_mamba2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    *,
    num_heads: int,
    generator: torch.Generator | None = None,
    conv_width: int = 4,
) -> dict[str, Tensor]:
    """Initialise a Mamba2 mixer from attention weights (the method of MambaInLlama).

    in_proj rows [z | x | B | C | dt] = [random | W_V | W_K | W_Q | random];  out_proj = W_O.
    z and dt rows are uniform in +-hidden^-1/2, conv taps and biases in +-conv_width^-1/2;
    dt_bias, A_log and D as :func:`draw_ssm_parameters`; the norm weight is 1.

    Args:
        q: [num_heads * d, hidden] query projection.
        k: [num_kv_heads * d, hidden] key projection.
        v: [num_kv_heads * d, hidden] value projection.
        o: [hidden, num_heads * d] output projection.
        num_heads: Query heads, which become SSM heads.
        generator: Source of the random rows; a CPU generator.
        conv_width: Taps of the convolution.

    Returns:
        The state dict of a ``Mamba2Mixer`` with head_dim = state_size = d; dt_bias, A_log and D
        are fp32, the rest has the dtype of the weights.

    Raises:
        ValueError: If the sizes do not fit together.
    """
    inner, hidden = q.shape
    if inner % num_heads or k.shape != v.shape or o.shape != (hidden, inner):
        raise ValueError(
            f"gqa_to_mamba2: q must be [{num_heads} * d, hidden], k and v alike, o its transpose's "
            f"shape, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}, {list(o.shape)}"
        )

    def draw(*shape: int, bound: float) -> Tensor:
        values = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
        return values.to(q)

    conv_dim = 2 * k.size(0) + inner
    z, dt = draw(inner, hidden, bound=hidden**-0.5), draw(num_heads, hidden, bound=hidden**-0.5)
    dt_bias, A_log, D = (t.to(q.device) for t in draw_ssm_parameters(num_heads, generator))
    return {
        "in_proj.weight": torch.cat((z, v, k, q, dt)),
        "conv1d.weight": draw(conv_dim, 1, conv_width, bound=conv_width**-0.5),
        "conv1d.bias": draw(conv_dim, bound=conv_width**-0.5),
        "dt_bias": dt_bias,
        "A_log": A_log,
        "D": D,
        "norm.weight": torch.ones_like(q[:, 0]),
        "out_proj.weight": o,
    }
