"""Padding cut out of a batch before the first layer, and put back after the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packing:
    """How a padded batch [B, T] maps to one row of its real tokens.

    Attributes:
        shape: (B, T).
        lengths: Real tokens of every row, on the host.
        index: int64 places of the real tokens in the flattened batch; None = nothing is padded.
        cu_seqlens: [B + 1] int32 bounds in the packed row; None = the batch stays [B, T].
    """

    shape: tuple[int, int]
    lengths: list[int]
    index: Tensor | None
    cu_seqlens: Tensor | None

    @classmethod
    def of(
        cls, attention_mask: Tensor | None, hidden: Tensor, cu_seqlens: Tensor | None
    ) -> Packing:
        """Read the mask (copied to the host where given).

        Raises:
            ValueError: If mask, hidden and cu_seqlens contradict each other.
        """
        batch, columns = hidden.shape[:2]
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"ZebraModel: cu_seqlens needs one packed row, got {batch} rows")
            if attention_mask is not None:
                raise ValueError("ZebraModel: pass attention_mask or cu_seqlens, not both")
            return cls((batch, columns), [columns], None, cu_seqlens)
        full = cls((batch, columns), [columns] * batch, None, None)
        if attention_mask is None:
            return full
        if attention_mask.dim() != 2 or attention_mask.size(0) != batch:
            raise ValueError(
                f"ZebraModel: attention_mask must be [{batch}, tokens] of 1 and 0, "
                f"got {list(attention_mask.shape)}"
            )
        if attention_mask.size(1) < columns:
            raise ValueError(
                f"ZebraModel: attention_mask must cover the {columns} new tokens, "
                f"got {attention_mask.size(1)} columns"
            )
        real = attention_mask[:, attention_mask.size(1) - columns :].bool()
        lengths = real.sum(1).tolist()
        if all(n == columns for n in lengths):
            return full
        bounds = torch.tensor([0, *lengths], device=hidden.device).cumsum(0).int()
        index = real.flatten().nonzero()[:, 0].to(hidden.device)
        return cls((batch, columns), lengths, index, bounds)

    @property
    def packed(self) -> bool:
        """Whether the real tokens lie in one row."""
        return self.index is not None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, total, ...]."""
        return x if self.index is None else x.flatten(0, 1)[self.index][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, total, ...] -> [B, T, ...] with zeros where the padding was."""
        if self.index is None:
            return x
        rows = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return rows.index_copy(0, self.index, x[0]).unflatten(0, self.shape)
