"""One decoder layer: a token mixer and an MLP, each behind a norm, around the residual stream."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from zebra.cache import CacheRows, PagedLayer, StateLayer
from zebra.layers import (
    MAX_STEP_TOKENS,
    MLP,
    Attention,
    Mamba2Mixer,
    MultiheadLatentAttention,
    RMSNorm,
    RotaryEmbedding,
)
from zebra.models.configuration_zebra import ZebraConfig


class ZebraDecoderLayer(nn.Module):
    """u = x + Mixer(norm(x));  y = u + MLP(norm(u)).

    The mixer is ``mla``, ``mamba`` or ``self_attn`` by config.layer_types[layer_idx].
    """

    def __init__(
        self, config: ZebraConfig, layer_idx: int, rotary: dict[str, RotaryEmbedding]
    ) -> None:
        super().__init__()
        c, self.kind = config, config.layer_types[layer_idx]
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if self.kind == "mla":
            self.mla = MultiheadLatentAttention(
                c.hidden_size,
                c.num_attention_heads,
                c.num_key_value_heads,
                c.kv_lora_rank,
                c.qk_nope_head_dim,
                c.qk_rope_head_dim,
                c.v_head_dim,
                rotary["mla"],
                q_lora_rank=c.q_lora_rank,
                latent_norm=c.use_lora_layer_norm,
            )
        elif self.kind == "mamba2":
            self.mamba = Mamba2Mixer(
                c.hidden_size,
                c.num_attention_heads,
                c.head_dim,
                c.ssm_state_size,
                c.num_key_value_heads,
                c.ssm_conv_width,
                c.rms_norm_eps,
            )
        else:
            self.self_attn = Attention(
                c.hidden_size,
                c.num_attention_heads,
                c.num_key_value_heads,
                c.head_dim,
                rotary["attention"],
                bias=c.attention_bias,
                out_bias=c.attention_out_bias,
                qk_norm=c.qk_norm,
                norm_eps=c.rms_norm_eps,
            )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rows: CacheRows | None = None,
        store: PagedLayer | StateLayer | None = None,
        decode: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            hidden: [B, T, hidden_size], or [1, total, hidden_size] with cu_seqlens.
            positions: [B, T] int64; None counts from 0 in every sequence.
            cu_seqlens: [n_seq + 1] int32 bounds of packed sequences.
            rows: Where the new tokens go in the cache.
            store: This layer's part of the cache (mutated), with rows.
            decode: Every row brings one token: take the decoding step.

        Returns:
            The stream leaving the layer, and what the mixer added to it (None with decode, whose
            output projection adds to the stream).
        """
        if decode:
            assert rows is not None and store is not None and positions is not None
            hidden = self.step_mixer(hidden, positions, rows, store)
            return self.mlp.step(hidden, self.post_attention_layernorm), None
        x = self.input_layernorm(hidden)
        if self.kind == "mamba2":
            mixed = self._mix_states(x, cu_seqlens, rows, cast("StateLayer | None", store))
        else:
            pages = cast("PagedLayer | None", store)
            mixed = self._mix_tokens(x, positions, cu_seqlens, rows, pages)
        x, hidden = self.post_attention_layernorm.add(mixed.to(hidden.dtype), hidden)
        return hidden + self.mlp(x), mixed

    def step_mixer(
        self, hidden: Tensor, positions: Tensor, rows: CacheRows, store: PagedLayer | StateLayer
    ) -> Tensor:
        """hidden + Mixer(norm(hidden)) for one token of every row; arguments as forward's."""
        norm = self.input_layernorm
        if isinstance(store, StateLayer):
            conv, ssm = store.conv_state, store.ssm_state
            return self.mamba.step(hidden, conv, ssm, rows.slots, norm, hidden)
        place = (store.pages, rows.slot_mapping, rows.block_table, rows.seq_lens)
        if self.kind == "mla":
            return self.mla.step(hidden, positions, *place, norm=norm, residual=hidden)
        return self.self_attn.step(norm(hidden), positions, *place, residual=hidden)

    def _mix_tokens(
        self,
        x: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        rows: CacheRows | None,
        store: PagedLayer | None,
    ) -> Tensor:
        mixer = self.mla if self.kind == "mla" else self.self_attn
        if rows is None or store is None:
            return mixer(x, positions, cu_seqlens)
        # a few tokens after a prefix: one batched step instead of a gather per sequence
        if cu_seqlens is None and x.size(1) <= MAX_STEP_TOKENS and any(rows.prefix_lens):
            assert positions is not None
            return mixer.step(
                x, positions, store.pages, rows.slot_mapping, rows.block_table, rows.seq_lens
            )
        return mixer(
            x,
            positions,
            cu_seqlens,
            cache=store.pages,
            slot_mapping=rows.slot_mapping,
            block_table=rows.block_table,
            prefix_lens=rows.prefix_lens,
            new_lens=rows.new_lens,
        )

    def _mix_states(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        rows: CacheRows | None,
        store: StateLayer | None,
    ) -> Tensor:
        if rows is None or store is None:
            return self.mamba(x, cu_seqlens)[0]
        conv, ssm, slots = store.conv_state, store.ssm_state, rows.slots
        old: tuple[Tensor | None, Tensor | None] = (None, None)
        if any(rows.prefix_lens):
            old = (conv[slots], ssm[slots])
        mixed, last_conv, last_ssm = self.mamba(x, cu_seqlens, *old)
        conv[slots], ssm[slots] = last_conv.to(conv.dtype), last_ssm.to(ssm.dtype)
        return cast(Tensor, mixed)
