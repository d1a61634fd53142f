"""Rotary position embeddings: frequencies of every supported type, and their cos/sin tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_frequencies(dim: int, parameters: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Return the angular frequencies of a rotary embedding and the factor of its cos and sin.

    With f_i = theta^(-2i/dim):
    "default": f_i;  "linear": f_i / factor;
    "llama3": f_i where the wavelength is short, f_i / factor where it is long, blended between;
    "yarn": f_i (1 - r_i) + (f_i / factor) r_i, r_i = clip((i - low) / (high - low), 0, 1),
    low = floor(g(beta_fast)), high = ceil(g(beta_slow)),
    g(n) = dim ln(window / (2 pi n)) / (2 ln theta); cos and sin are multiplied by
    0.1 ln(factor) + 1.

    Args:
        dim: Number of rotated channels, even.
        parameters: ``rope_type``, ``rope_theta`` and what the type needs (``factor``,
            ``original_max_position_embeddings``, ``low_freq_factor``, ``high_freq_factor``,
            ``beta_fast``, ``beta_slow``, ``mscale``, ``mscale_all_dim``, ``attention_factor``).

    Returns:
        Frequencies [dim / 2] in radians per position (fp64) and the magnitude.

    Raises:
        ValueError: If the type is unknown, a parameter is missing, or a value is out of range.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_parameters: rope_type must be one of {ROPE_TYPES}, got {kind!r}")
    if dim < 2 or dim % 2:
        raise ValueError(f"rope_parameters: the rotated dim must be even and positive, got {dim}")
    theta = _number(parameters, "rope_theta", kind)
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if kind == "default":
        return frequency, 1.0
    factor = _number(parameters, "factor", kind)
    if kind == "linear":
        return frequency / factor, 1.0
    window = _number(parameters, "original_max_position_embeddings", kind)
    if kind == "llama3":
        low = _number(parameters, "low_freq_factor", kind)
        high = _number(parameters, "high_freq_factor", kind)
        if not high > low:
            raise ValueError(
                f"rope_parameters: high_freq_factor must exceed low_freq_factor, "
                f"got {high} and {low}"
            )
        turns = window * frequency / (2 * math.pi)  # full rotations inside the original window
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * keep + frequency / factor * (1 - keep), 1.0
    low, high = (_turning_dim(parameters.get(k) or v, dim, theta, window) for k, v in _BETAS)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)
    ramp = ramp.clamp(0, 1)
    return frequency * (1 - ramp) + frequency / factor * ramp, _yarn_magnitude(parameters, factor)


_BETAS = (("beta_fast", 32.0), ("beta_slow", 1.0))


def _number(parameters: Mapping[str, Any], key: str, kind: str) -> float:
    """Read a positive number or say which one the rope type lacks."""
    value = parameters.get(key)
    if not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"rope_parameters: rope_type {kind!r} needs {key} > 0, got {value!r}")
    return float(value)


def _turning_dim(turns: float, dim: int, theta: float, window: float) -> float:
    """g(n): the (fractional) frequency index that makes ``turns`` rotations in the window."""
    return dim * math.log(window / (2 * math.pi * turns)) / (2 * math.log(theta))


def _yarn_magnitude(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    log = 0.1 * math.log(factor) if factor > 1 else 0.0
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return float((mscale * log + 1) / (all_dim * log + 1))
    return log + 1


class RotaryEmbedding(nn.Module):
    """The cos and sin tables of one rotary embedding, made once per device.

    The tables are neither parameters nor buffers: they follow from the configuration, stay fp32
    whatever dtype the model is cast to, and keep one address for the life of the module.

    Args:
        dim: Number of rotated channels E.
        max_positions: Number of rows of the tables.
        parameters: See :func:`rope_frequencies`; None means type "default" with theta 10000.

    Raises:
        ValueError: See :func:`rope_frequencies`.
    """

    def __init__(
        self, dim: int, max_positions: int, parameters: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if max_positions < 1:
            raise ValueError(
                f"RotaryEmbedding: max_positions must be positive, got {max_positions}"
            )
        self.dim, self.max_positions = dim, max_positions
        self.parameters_dict = dict(parameters or {"rope_type": "default", "rope_theta": 10000.0})
        with torch.device("cpu"):  # models are also built under torch.device("meta")
            self.inv_freq, self.magnitude = rope_frequencies(dim, self.parameters_dict)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [max_positions, dim / 2] fp32, magnitude included."""
        if device not in self._tables:
            position = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
            angle = torch.outer(position, self.inv_freq)
            self._tables[device] = tuple(  # type: ignore[assignment]
                (self.magnitude * f(angle)).float().to(device) for f in (torch.cos, torch.sin)
            )
        return self._tables[device]

    def extra_repr(self) -> str:
        """Describe the embedding in ``print(model)``."""
        return f"dim={self.dim}, max_positions={self.max_positions}, {self.parameters_dict}"


def apply_rotary_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x [B, T, H, d] by tables [B, T, d/2]; fp32 inside.

    The pairing of Hugging Face Llama, Mistral and Qwen; MLA rotates adjacent pairs instead.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
