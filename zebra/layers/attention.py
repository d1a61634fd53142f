"""Grouped-query attention for the layers that a conversion keeps as they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zebra.layers.linear import decode_linear
from zebra.layers.mla import sequence_positions
from zebra.layers.norm import RMSNorm
from zebra.layers.rope import RotaryEmbedding, apply_rotary_half


class Attention(nn.Module):
    """Causal grouped-query attention of Llama, Mistral, Qwen2 and Qwen3.

    q = W_q x, k = W_k x, v = W_v x (+ biases);  q, k through RMSNorm per head (``qk_norm``), then
    RoPE on the pairs (i, i + d/2);  y = W_o softmax(q k^T / sqrt(d)) v.

    Args:
        hidden_size: Width of the input and output.
        num_heads: Query heads H.
        num_kv_heads: KV heads G; divides num_heads.
        head_dim: Channels per head d.
        rotary: The rotary embedding of width d; share one between layers.
        bias: Biases on the q, k and v projections.
        out_bias: Bias on the output projection.
        qk_norm: RMSNorm over d on queries and keys, before RoPE.
        norm_eps: eps of that norm.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: RotaryEmbedding,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"Attention: num_heads must be a multiple of num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}"
            )
        if rotary.dim != head_dim:
            raise ValueError(f"Attention: rotary must have dim {head_dim}, got {rotary.dim}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rotary = rotary
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=out_bias)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    @property
    def cache_width(self) -> int:
        """Numbers cached per token: keys and values of every KV head."""
        return 2 * self.num_kv_heads * self.head_dim

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        cache: Tensor | None = None,
        slot_mapping: Tensor | None = None,
        block_table: Tensor | None = None,
        prefix_lens: Sequence[int] | None = None,
        new_lens: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend over full sequences; optionally fill and continue a paged cache.

        The arguments are those of ``MultiheadLatentAttention.forward``; the cache cache is
        [pages, page, 2 * G * d], keys then values, and its last page takes what is not stored.
        """
        if positions is None:
            positions = sequence_positions(hidden, cu_seqlens)
        q, k, v = self._project(hidden, positions)
        if cache is not None and slot_mapping is not None:
            self._store(cache, slot_mapping, k, v)
        if prefix_lens is not None and any(prefix_lens):
            if cache is None or block_table is None or new_lens is None:
                raise ValueError(
                    "Attention: prefix_lens needs cache, slot_mapping, block_table, new_lens"
                )
            page, out = cache.size(1), []
            rows = q.flatten(0, 1).split(list(new_lens))
            for i, (row, prefix, new) in enumerate(zip(rows, prefix_lens, new_lens, strict=True)):
                pages = block_table[i, : -(-(prefix + new) // page)].long()
                past = cache[pages].flatten(0, 1)[None, : prefix + new]
                out.append(
                    self._attend(row[None], *self._split(past), self._causal(row[None], past))
                )
            o = torch.cat(out, dim=1).view(q.shape)
        elif cu_seqlens is None:
            o = self._attend(q, k, v, None)
        else:
            o = self._attend(q, k, v, _same_sequence(cu_seqlens, q.size(1)))
        out_: Tensor = self.o_proj(o.flatten(2))
        return out_

    def step(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Append T tokens to every sequence and attend to its cache; shapes as MLA's ``step``.

        Reads every page of the block table, used or not, so that no shape depends on a length.
        """
        q, k, v = self._project(hidden, positions)
        self._store(cache, slot_mapping, k, v)
        past = cache[block_table.long()].flatten(1, 2)  # [B, max_pages * page, 2 G d]
        key, value = self._split(past)
        last = seq_lens[:, None] - hidden.size(1) + torch.arange(hidden.size(1), device=q.device)
        seen = torch.arange(past.size(1), device=q.device) <= last[..., None]  # [B, T, S]
        # unused slots may hold anything, NaN included: 0 * NaN would reach the output
        value = value.masked_fill(~seen[:, -1, :, None, None], 0)
        key = key.masked_fill(~seen[:, -1, :, None, None], 0)
        o = self._attend(q, key, value, seen[:, None]).flatten(2)
        return decode_linear(self.o_proj, o, residual=residual)

    def _project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        cos, sin = (table[positions] for table in self.rotary.tables(hidden.device))
        return apply_rotary_half(q, cos, sin), apply_rotary_half(k, cos, sin), v

    def _store(self, cache: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        row = torch.cat((k.flatten(2), v.flatten(2)), dim=-1).to(cache.dtype)
        # slot -1 is the last row of the last page, which holds no sequence
        cache.view(-1, self.cache_width)[slot_mapping.flatten()] = row.flatten(0, 1)

    def _split(self, past: Tensor) -> tuple[Tensor, Tensor]:
        key, value = past.unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(2)
        return key, value

    @staticmethod
    def _causal(q: Tensor, past: Tensor) -> Tensor:
        shape = (q.size(1), past.size(1))
        return torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - shape[0])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, H, d] against [B, S, G, d]; without a mask causal over T == S."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2).to(q.dtype), v.transpose(1, 2).to(q.dtype)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return o.transpose(1, 2)


def _same_sequence(cu_seqlens: Tensor, total: int) -> Tensor:
    """The causal mask [total, total] of packed sequences."""
    token = torch.arange(total, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens.long(), token, right=True)
    return (row[:, None] == row) & (token[:, None] >= token)
