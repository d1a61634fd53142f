"""Multi-head latent attention: one class for training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zebra import ops
from zebra.layers.dtypes import autocast
from zebra.layers.linear import decode_linear, is_inference, is_untouched, require_plain
from zebra.layers.norm import RMSNorm
from zebra.layers.rope import RotaryEmbedding
from zebra.ops.project import Angles, append_rows

MAX_STEP_TOKENS = 16  # the absorbed form of one decoding step; more new tokens use forward()

# How many new query rows of a sequence attend to its cached latents themselves (absorbed) before
# expanding them to keys and values is cheaper, by (H, G, R, Dn, Dv).  Where both need the same
# number of multiplications (see _equal_work), until measured.
ABSORBED_ROWS = {
    (32, 8, 128, 32, 64): 19,  # Zebra 1B
    (24, 8, 128, 64, 128): 128,  # 3B
    (32, 8, 160, 64, 128): 60,  # 8B
    (32, 8, 128, 64, 128): 96,  # 8B with rank 128
    (128, 128, 512, 128, 128): 171,  # DeepSeek-V3
}


def _equal_work(H: int, G: int, R: int, Dn: int, Dv: int) -> int:
    """Rows at which 2 R G (Dn + Dv) flops a key equal H 2 (2 R - Dn - Dv) flops a (row, key)."""
    dearer = H * (2 * R - Dn - Dv)
    return R * G * (Dn + Dv) // dearer if dearer > 0 else 1 << 30


class MultiheadLatentAttention(nn.Module):
    """Attention whose keys and values are a shared low-rank latent plus one rotary key.

    c_q = W_qa x;  q_h = [q_nope | RoPE(q_rope)] = W_qb,h c_q;  [c | k] = W_kva x;  k_rope = RoPE(k)
    [k_nope | v]_g = W_kvb,g c;  o_h = softmax(s q_h [k_nope | k_rope]_g^T) v_g;  y = W_o concat(o)

    Query head h reads KV head g = h // (num_heads / num_kv_heads).  Only [c | k_rope] is cached,
    kv_lora_rank + qk_rope_head_dim numbers a token.  RoPE rotates adjacent pairs.

    The projections' weights go to one operator.  Where a projection or a latent norm is no plain
    nn.Linear or RMSNorm (an adapter or a quantised layer took its place, a hook is registered) all
    of them are called instead, and kv_b_proj's weight for the absorbed form is what it makes of the
    identity.

    Args:
        hidden_size: Width of the input and output.
        num_heads: Query heads H.
        num_kv_heads: KV heads G made by the up-projection; divides num_heads.
        kv_lora_rank: Width R of the cached latent c.
        qk_nope_head_dim: Query and key channels per head without position, Dn.
        qk_rope_head_dim: Rotated channels E, one key for all heads; even.
        v_head_dim: Value channels per head Dv.
        rotary: The rotary embedding of width E; share one between layers.
        q_lora_rank: Width of c_q; None projects the queries directly (``q_proj``).
        latent_norm: Apply an RMSNorm to c_q and to c (DeepSeek does, Zebra does not).
        softmax_scale: s; None means (Dn + E) ** -0.5.
        norm_eps: eps of the latent norms.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rotary: RotaryEmbedding,
        q_lora_rank: int | None = None,
        latent_norm: bool = False,
        softmax_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"MultiheadLatentAttention: num_heads must be a multiple of num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}"
            )
        if rotary.dim != qk_rope_head_dim:
            raise ValueError(
                f"MultiheadLatentAttention: rotary must have dim qk_rope_head_dim = "
                f"{qk_rope_head_dim}, got {rotary.dim}"
            )
        shape = (num_heads, num_kv_heads, kv_lora_rank, qk_nope_head_dim, v_head_dim)
        self.absorbed_rows = ABSORBED_ROWS.get(shape, _equal_work(*shape))
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.qk_nope_head_dim, self.v_head_dim = qk_nope_head_dim, v_head_dim
        qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = qk_head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.norm_eps = norm_eps
        self.rotary = rotary
        if q_lora_rank is None:
            self.q_a_proj = None
            self.q_proj = nn.Linear(hidden_size, num_heads * qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False
        )
        self.kv_b_proj = nn.Linear(
            kv_lora_rank, num_kv_heads * (qk_nope_head_dim + v_head_dim), bias=False
        )
        self.q_a_layernorm = (
            RMSNorm(q_lora_rank, norm_eps) if latent_norm and q_lora_rank is not None else None
        )
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, norm_eps) if latent_norm else None
        self.out_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)

    @torch.no_grad()
    def merge_query(self) -> None:
        """Replace q_a_proj and q_b_proj by their product, one projection a decoding step less.

        For inference, in place; the parameters are then those of ``q_lora_rank=None``.  The product
        is rounded once to the weights' dtype.

        Raises:
            ValueError: If a norm stands between the two, or one of them is not a plain nn.Linear.
        """
        if self.q_a_proj is None:
            return
        for name, layer in (("q_a_proj", self.q_a_proj), ("q_b_proj", self.q_b_proj)):
            require_plain(layer, f"MultiheadLatentAttention.merge_query: {name}")
        if self.q_a_layernorm is not None:
            raise ValueError("MultiheadLatentAttention.merge_query: a norm follows q_a_proj")
        first, second = self.q_a_proj.weight, self.q_b_proj.weight
        merged = nn.Linear(first.size(1), second.size(0), bias=False, device="meta")
        product = (second.double() @ first.double()).to(first.dtype)
        merged.weight = nn.Parameter(product, requires_grad=first.requires_grad)
        self.q_proj, self.q_a_proj = merged, None
        del self.q_b_proj

    @property
    def cache_width(self) -> int:
        """Numbers cached per token: kv_lora_rank + qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim

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
        """Attend over full sequences, expanded form; optionally fill and continue a latent cache.

        Args:
            hidden: [B, T, hidden_size], or [1, total, hidden_size] with cu_seqlens.
            positions: [B, T] int64 positions for RoPE; None counts from 0 in every sequence.
            cu_seqlens: [n_seq + 1] int32 bounds of packed sequences.
            cache: [pages, page, R + E] cache to append to (mutated), with slot_mapping.
            slot_mapping: [B, T] int64, page * page_size + offset of every token; -1 = not stored.
            block_table: [n_seq, max_pages] int32, needed where a sequence continues a prefix.
            prefix_lens: Cached tokens of every sequence before this call, on the host; None or all
                zeros attends to the new tokens alone.
            new_lens: New tokens of every sequence, on the host, with prefix_lens.

        Returns:
            [B, T, hidden_size].

        Raises:
            ValueError: If only a part of a cache is given.
        """
        if (cache is None) != (slot_mapping is None):
            raise ValueError("MultiheadLatentAttention: cache and slot_mapping come together")
        if positions is None:
            positions = sequence_positions(hidden, cu_seqlens)
        q, latent = self._project(hidden, positions, cache, slot_mapping)
        if prefix_lens is not None and any(prefix_lens):
            if cache is None or block_table is None or new_lens is None:
                raise ValueError(
                    "MultiheadLatentAttention: prefix_lens needs cache, slot_mapping, "
                    "block_table and new_lens"
                )
            o = self._continue(q, cache, block_table, prefix_lens, new_lens)
        else:
            o = self._attend(q, latent, cu_seqlens)
        out: Tensor = self.out_proj(o.flatten(2))
        return out

    def step(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Append T <= 16 tokens to every sequence and attend to its cache, absorbed form.

        Args:
            hidden: [B, T, hidden_size].
            positions: [B, T] int64 positions for RoPE.
            cache: [pages, page, R + E] (mutated).
            slot_mapping: [B, T] int64, where the new tokens go; -1 = not stored.
            block_table: [B, max_pages] int32.
            seq_lens: [B] int32 cached tokens including the new ones; 0 = padding row.
            norm: Applied to hidden first.
            residual: [B, T, hidden_size], added to the result.

        Returns:
            [B, T, hidden_size].
        """
        if norm is not None and not (is_untouched(norm, RMSNorm) and is_inference(hidden)):
            hidden, norm = norm(hidden), None
        q, _ = self._project(hidden, positions, cache, slot_mapping, norm)
        o = self._absorbed(q, cache, block_table, seq_lens).flatten(2)
        return decode_linear(self.out_proj, o, residual=residual)

    def _absorbed(self, q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor) -> Tensor:
        """Attend to the cached latents themselves: q [B, T <= 16, H, Dn + E] -> [B, T, H, Dv]."""
        q, kv_b_weight = autocast(q, self._kv_b_weight(q))
        o, _ = ops.mla_decode(
            q,
            cache,
            block_table,
            seq_lens,
            self.softmax_scale,
            kv_b_weight=kv_b_weight,
            num_kv_heads=self.num_kv_heads,
            kv_lora_rank=self.kv_lora_rank,
        )
        return o

    def _project(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: Tensor | None,
        slot_mapping: Tensor | None,
        norm: RMSNorm | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries with their rope part rotated, and [c | k_rope], stored where a cache is given."""
        if not self._is_plain():
            hidden = hidden if norm is None else norm(hidden)
            return self._project_by_layers(hidden, positions, cache, slot_mapping)
        q_a_weight = None if self.q_a_proj is None else self.q_a_proj.weight
        q_b_weight = self.q_proj.weight if self.q_a_proj is None else self.q_b_proj.weight
        q_norm = None if self.q_a_layernorm is None else self.q_a_layernorm.weight
        kv_norm = None if self.kv_a_layernorm is None else self.kv_a_layernorm.weight
        cos, sin = self.rotary.tables(hidden.device)
        heads, eps = self.num_heads, self.norm_eps
        hidden, q_a_weight, q_b_weight, kv_a_weight, q_norm, kv_norm = autocast(
            hidden, q_a_weight, q_b_weight, self.kv_a_proj_with_mqa.weight, q_norm, kv_norm
        )
        if cache is None or slot_mapping is None:
            return ops.mla_project(
                hidden, q_a_weight, q_b_weight, kv_a_weight,
                cos, sin, positions, heads, q_norm, kv_norm, eps,
            )  # fmt: skip
        return ops.mla_project_append(
            hidden, q_a_weight, q_b_weight, kv_a_weight,
            cos, sin, positions, heads, cache, slot_mapping, q_norm, kv_norm, eps,
            *(() if norm is None else (norm.weight, norm.eps)),
        )  # fmt: skip

    def _is_plain(self) -> bool:
        """Whether the weights say all that calling the projections and latent norms would do."""
        first = (self.q_proj,) if self.q_a_proj is None else (self.q_a_proj, self.q_b_proj)
        norms = [n for n in (self.q_a_layernorm, self.kv_a_layernorm) if n is not None]
        return all(is_untouched(m, nn.Linear) for m in (*first, self.kv_a_proj_with_mqa)) and all(
            is_untouched(n, RMSNorm) for n in norms
        )

    def _project_by_layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: Tensor | None,
        slot_mapping: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What ops.mla_project does, by calling the projections and norms."""
        cos, sin = self.rotary.tables(hidden.device)
        angles = Angles(cos[positions], sin[positions])
        if self.q_a_proj is None:
            q = self.q_proj(hidden)
        else:
            c_q = self.q_a_proj(hidden)
            q = self.q_b_proj(c_q if self.q_a_layernorm is None else self.q_a_layernorm(c_q))
        widths = [self.kv_lora_rank, self.qk_rope_head_dim]
        c, k = self.kv_a_proj_with_mqa(hidden).split(widths, dim=-1)
        c = c if self.kv_a_layernorm is None else self.kv_a_layernorm(c)
        q, latent = angles.assemble(q, c, k, self.num_heads)
        if cache is not None and slot_mapping is not None:
            append_rows(latent.to(cache.dtype), cache, slot_mapping)
        return q, latent

    def _kv_b_weight(self, like: Tensor) -> Tensor:
        """[G * (Dn + Dv), R] of the linear map that kv_b_proj is."""
        if is_untouched(self.kv_b_proj, nn.Linear):
            return self.kv_b_proj.weight
        identity = torch.eye(self.kv_lora_rank, dtype=like.dtype, device=like.device)
        weight: Tensor = self.kv_b_proj(identity).t().contiguous()
        return weight

    def _attend(self, q: Tensor, latent: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Expand the latents [B, S, R + E] to keys and values, then attend causally."""
        c, k_rope = latent.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(c).unflatten(-1, (self.num_kv_heads, -1))
        o, _ = ops.mla_attention(q, kv, k_rope, self.softmax_scale, cu_seqlens)
        return o

    def _continue(
        self,
        q: Tensor,
        cache: Tensor,
        block_table: Tensor,
        prefix_lens: Sequence[int],
        new_lens: Sequence[int],
    ) -> Tensor:
        """Let each sequence's new queries attend to its cached prefix and to themselves."""
        page = cache.size(1)
        rows = q.flatten(0, 1).split(list(new_lens))
        out = []
        for i, (row, prefix, new) in enumerate(zip(rows, prefix_lens, new_lens, strict=True)):
            length = prefix + new
            if new <= self.absorbed_rows:
                out.append(self._absorb_rows(row, cache, block_table[i], prefix)[None])
                continue
            pages = block_table[i, : -(-length // page)].long()
            out.append(self._attend(row[None], cache[pages].flatten(0, 1)[None, :length], None))
        return torch.cat(out, dim=1).view(*q.shape[:3], self.v_head_dim)

    def _absorb_rows(self, q: Tensor, cache: Tensor, pages: Tensor, prefix: int) -> Tensor:
        """q [new, H, Dn + E] of one sequence, absorbed: each 16 rows as a sequence of their own."""
        out, new = [], q.size(0)
        whole = new // MAX_STEP_TOKENS * MAX_STEP_TOKENS
        for first, end, size in ((0, whole, MAX_STEP_TOKENS), (whole, new, new - whole)):
            if first == end:
                continue
            chunks = q[first:end].unflatten(0, (-1, size))
            seen = torch.arange(
                prefix + first + size, prefix + end + 1, size, dtype=torch.int32, device=q.device
            )
            table = pages.expand(chunks.size(0), -1).contiguous()
            out.append(self._absorbed(chunks, cache, table, seen).flatten(0, 1))
        return torch.cat(out) if out else q.new_empty(0, q.size(1), self.v_head_dim)


def sequence_positions(hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Positions [B, T] counting from 0 in every row, or in every packed sequence."""
    tokens = torch.arange(hidden.size(1), device=hidden.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        tokens = tokens - bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
    return tokens.expand(hidden.size(0), -1)
