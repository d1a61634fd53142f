"""ZebraModel and ZebraForCausalLM: the hybrid as Hugging Face models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from zebra.cache import CacheRows, HybridCache
from zebra.layers import Mamba2Mixer, MultiheadLatentAttention, RMSNorm, RotaryEmbedding
from zebra.layers.dtypes import autocast
from zebra.layers.linear import decode_linear
from zebra.layers.mamba2 import HeadNormWeight
from zebra.models.cache_name import CACHE_NAME, CACHE_NAMES, one_cache
from zebra.models.checkpoint import official_config
from zebra.models.configuration_zebra import ZebraConfig
from zebra.models.decoder_layer import ZebraDecoderLayer
from zebra.models.loss import next_token_loss
from zebra.models.padding import Packing


@dataclass
class ZebraOutput(CausalLMOutputWithPast):
    """What the models return.

    Attributes:
        loss: Mean next-token cross entropy in nats, where labels are given.
        logits: [B, T or logits_to_keep, vocab_size] (ZebraForCausalLM).
        last_hidden_state: [B, T, hidden_size] after the final norm (ZebraModel).
        past_key_values: The :class:`HybridCache`; from transformers 5.24 on also ``cache``.
        hidden_states: With output_hidden_states, the state entering every layer, then the state
            after the final norm.
        mixer_outputs: With output_mixer_outputs, what every token mixer added to the stream.
    """

    last_hidden_state: Tensor | None = None
    mixer_outputs: tuple[Tensor, ...] | None = None


class ZebraPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading shared by the Zebra models."""

    config_class = ZebraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ZebraDecoderLayer"]  # noqa: RUF012  (transformers' own form)
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012
    # exp(-exp(A_log) * dt) over thousands of tokens: bf16 would change the decay rates
    _keep_in_fp32_modules_strict = {"A_log", "D", "dt_bias"}  # noqa: RUF012
    # views of kv_b_proj that the authors' inference code saves beside it
    _keys_to_ignore_on_load_unexpected = [r"\.mla\.w[kv]_b$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint did not bring; nn.init leaves loaded weights alone."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(cast(Tensor, module.bias))
        elif isinstance(module, (RMSNorm, HeadNormWeight)):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, Mamba2Mixer) and not any(
            getattr(p, "_is_hf_initialized", False)
            for p in (module.A_log, module.D, module.dt_bias)
        ):
            module.reset_ssm_parameters()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a Zebra checkpoint, ours or in the layout of the amd/Zebra-Llama repositories.

        Args:
            pretrained_model_name_or_path: Folder or hub name.
            *model_args: As in ``PreTrainedModel.from_pretrained``.
            config: As in ``PreTrainedModel.from_pretrained``.
            **kwargs: As in ``PreTrainedModel.from_pretrained``.

        Raises:
            ValueError: If an amd/Zebra-Llama checkpoint lacks a weight that its configuration asks
                for, or uses an option that we do not have.
        """
        if config is None and pretrained_model_name_or_path is not None:
            config = official_config(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, **kwargs
        )


class ZebraModel(ZebraPreTrainedModel):
    """The decoder without its output head."""

    def __init__(self, config: ZebraConfig) -> None:
        super().__init__(config)
        dims = {"mla": config.qk_rope_head_dim, "attention": config.head_dim}
        self.rotary = {
            kind: RotaryEmbedding(dim, config.max_position_embeddings, config.rope_parameters[kind])
            for kind, dim in dims.items()
            if kind in config.layer_types
        }
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ZebraDecoderLayer(config, i, self.rotary) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def new_cache(
        self, max_batch: int, max_length: int, num_pages: int | None = None, growable: bool = False
    ) -> HybridCache:
        """Make an empty decoding cache for this model.

        Args:
            max_batch: Sequences.
            max_length: Longest sequence, in tokens.
            num_pages: See :class:`HybridCache`.
            growable: See :class:`HybridCache`.
        """
        weight = self.embed_tokens.weight
        (activation,) = autocast(weight[:0])  # under autocast the layers store its dtype
        return HybridCache(
            self.config.cache_specs(),
            max_batch,
            max_length,
            num_pages,
            self.config.cache_page_size,
            activation.dtype,
            getattr(torch, self.config.ssm_state_dtype),
            weight.device,
            growable,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_mixer_outputs: bool = False,
        cache: HybridCache | None = None,
        **kwargs: Any,
    ) -> ZebraOutput:
        """Run the decoder.

        Args:
            input_ids: [B, T] int64; or inputs_embeds.
            attention_mask: [B, T], or [B, cached columns + T] with a cache: 1 = token, 0 = padding,
                on either side.  Padding is cut out before the first layer.
            position_ids: [B, T] (or [1, T]) positions for RoPE; None counts tokens.
            past_key_values: The cache (mutated).
            inputs_embeds: [B, T, hidden_size].
            use_cache: Return a cache; None means config.use_cache, and never where gradients flow.
            cu_seqlens: [n_seq + 1] int32 bounds of sequences packed in one row (B = 1).
            output_hidden_states: Return the state entering every layer and the final one.
            output_mixer_outputs: Return what every token mixer added to the stream.
            cache: Another name of past_key_values, that of transformers since 5.24.
            **kwargs: Ignored unless set; output_attentions is refused.

        Raises:
            ValueError: If the inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("ZebraModel: pass exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("ZebraModel: output_attentions is not supported: no layer holds them")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.size(1) > self.config.max_position_embeddings and cu_seqlens is None:
            raise ValueError(
                f"ZebraModel: sequences must have at most max_position_embeddings = "
                f"{self.config.max_position_embeddings} tokens, got {hidden.size(1)}"
            )
        cache = one_cache("ZebraModel", cache, past_key_values)
        cache = self._resolve_cache(cache, use_cache, hidden, cu_seqlens)
        packing = Packing.of(attention_mask, hidden, cu_seqlens)
        if position_ids is not None:
            position_ids = position_ids.expand(hidden.size(0), -1)
            position_ids = packing.pack(position_ids)
        columns, hidden = hidden.size(1), packing.pack(hidden)
        rows, decode = None, False
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("ZebraModel: cu_seqlens cannot be combined with a cache")
            rows = cache.extend(packing.lengths, packed=packing.packed)
            cache.columns += columns
            longest = max(cache.lengths)
            if longest > self.config.max_position_embeddings:
                raise ValueError(
                    f"ZebraModel: sequences must have at most max_position_embeddings = "
                    f"{self.config.max_position_embeddings} tokens, got {longest}"
                )
            decode = columns == 1 and not packing.packed and not output_mixer_outputs
            position_ids = rows.positions if position_ids is None else position_ids
        states: list[Tensor] = []
        mixed: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(packing.unpack(hidden))
            store = None if cache is None else cache.layers[i]
            arguments = (hidden, position_ids, packing.cu_seqlens, rows, store, decode)
            if self.gradient_checkpointing and self.training:
                hidden, mix = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                hidden, mix = layer(*arguments)
            if output_mixer_outputs:
                mixed.append(packing.unpack(mix))
        hidden = packing.unpack(self.norm(hidden))
        if output_hidden_states:
            states.append(hidden)
        return ZebraOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(states) if output_hidden_states else None,
            mixer_outputs=tuple(mixed) if output_mixer_outputs else None,
            **{CACHE_NAME: cast(Any, cache)},  # not a subclass of transformers' Cache
        )

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        new_lens: Sequence[int],
        cache: HybridCache,
        slots: Sequence[int] | None = None,
    ) -> Tensor:
        """Add tokens to sequences of a cache, whatever their lengths, whichever their slots.

        Args:
            input_ids: [total] int64, the new tokens of all sequences one after another.
            new_lens: New tokens of every sequence, each at least 1.
            cache: The cache (mutated).
            slots: Slot of every sequence; None means sequence i is slot i.

        Returns:
            [n_seq, hidden_size], the final state of every sequence's last token.

        Raises:
            ValueError: If the lengths do not add up or do not fit the cache.
        """
        if input_ids.shape != (sum(new_lens),) or min(new_lens, default=0) < 1:
            raise ValueError(
                f"ZebraModel.prefill: input_ids must be [sum(new_lens)] = [{sum(new_lens)}] with "
                f"every length at least 1, got {list(input_ids.shape)} and {list(new_lens)}"
            )
        rows = cache.extend(new_lens, slots, packed=True)
        cu_seqlens = torch.tensor([0, *new_lens], device=input_ids.device).cumsum(0).int()
        hidden = self.embed_tokens(input_ids[None])
        for layer, store in zip(self.layers, cache.layers, strict=True):
            hidden, _ = layer(hidden, rows.positions, cu_seqlens, rows, store)
        return cast(Tensor, self.norm(hidden[0, cu_seqlens[1:].long() - 1]))

    @torch.no_grad()
    def step(self, input_ids: Tensor, cache: HybridCache, rows: CacheRows) -> Tensor:
        """Decode one token of every row, without host work: safe to capture in a CUDA graph.

        Args:
            input_ids: [B] int64.
            cache: The cache (mutated).
            rows: From ``cache.advance`` (on the device) or ``cache.extend``.

        Returns:
            [B, hidden_size], the final state of every token.
        """
        return cast(Tensor, self.norm(self.step_without_norm(input_ids, cache, rows)))

    def step_without_norm(self, input_ids: Tensor, cache: HybridCache, rows: CacheRows) -> Tensor:
        """Like ``step``, for callers whose next operator applies the final norm itself."""
        hidden = self.embed_tokens(input_ids[:, None])
        for layer, store in zip(self.layers, cache.layers, strict=True):
            hidden, _ = layer(hidden, rows.positions, None, rows, store, True)
        return cast(Tensor, hidden[:, 0])

    def _resolve_cache(
        self,
        cache: HybridCache | None,
        use_cache: bool | None,
        hidden: Tensor,
        cu_seqlens: Tensor | None,
    ) -> HybridCache | None:
        """Return the cache to use, a new one, or None; refuse what could not be right."""
        grad = torch.is_grad_enabled() and hidden.requires_grad
        if cache is None:
            if not (use_cache or (use_cache is None and self.config.use_cache)):
                return None
            if grad or self.training or cu_seqlens is not None:
                if use_cache:
                    raise ValueError(
                        "ZebraModel: the cache is not differentiable and holds no packed rows: "
                        "pass use_cache=False, or use model.eval() and torch.no_grad()"
                    )
                return None
            return self.new_cache(hidden.size(0), hidden.size(1) + 64, growable=True)
        if not isinstance(cache, HybridCache):
            raise ValueError(
                f"ZebraModel: cache (past_key_values) must be a HybridCache (model.new_cache), "
                f"got {type(cache).__name__}"
            )
        if grad:
            raise ValueError(
                "ZebraModel: the cache is not differentiable: run under torch.no_grad()"
            )
        if hidden.size(0) > cache.max_batch:
            raise ValueError(
                f"ZebraModel: cache (past_key_values) holds {cache.max_batch} sequences, "
                f"the batch has {hidden.size(0)}"
            )
        return cache


class ZebraForCausalLM(ZebraPreTrainedModel, GenerationMixin):
    """The hybrid with its output head; works with generate(), Trainer and the Auto classes."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ZebraConfig) -> None:
        super().__init__(config)
        self.model = ZebraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def merge_queries(self) -> None:
        """Merge the two query projections of every MLA layer, for faster decoding.

        In place, for inference: see ``MultiheadLatentAttention.merge_query``.  The model is then
        one of ``config.q_lora_rank = None``, and is saved and loaded as such.

        Raises:
            ValueError: If the queries have a norm between their projections.
        """
        for module in self.modules():
            if isinstance(module, MultiheadLatentAttention):
                module.merge_query()
        self.config.q_lora_rank = None

    def new_cache(
        self, max_batch: int, max_length: int, num_pages: int | None = None, growable: bool = False
    ) -> HybridCache:
        """Make an empty decoding cache; see ``ZebraModel.new_cache``."""
        return self.model.new_cache(max_batch, max_length, num_pages, growable)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_mixer_outputs: bool = False,
        return_dict: bool | None = None,
        cache: HybridCache | None = None,
        **kwargs: Any,
    ) -> ZebraOutput | tuple[Any, ...]:
        """Return the logits, and the loss where labels are given.

        Args:
            input_ids: See ``ZebraModel.forward``, as the arguments not named here.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: [B, T] int64 next-token targets, unshifted, -100 = ignored.  Padding, and the
                first token of every sequence, never count.
            use_cache: See ``ZebraModel.forward``.
            logits_to_keep: Compute the logits of the last so many columns only (0 = all), or of
                the columns listed in an int64 tensor.
            cu_seqlens: See ``ZebraModel.forward``.
            output_hidden_states: See there.
            output_mixer_outputs: See there.
            return_dict: False returns a tuple.
            cache: See ``ZebraModel.forward``.
            **kwargs: num_items_in_batch divides the summed loss; see ``ZebraModel.forward``.

        Returns:
            A :class:`ZebraOutput`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        items = kwargs.pop("num_items_in_batch", None)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cu_seqlens,
            output_hidden_states,
            output_mixer_outputs,
            cache,
            **kwargs,
        )
        hidden = out.last_hidden_state
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("ZebraForCausalLM: labels need all logits: leave logits_to_keep at 0")
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels, attention_mask, cu_seqlens, items)
        output = ZebraOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            mixer_outputs=out.mixer_outputs,
            **{CACHE_NAME: getattr(out, CACHE_NAME)},
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        new_lens: Sequence[int],
        cache: HybridCache,
        slots: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the next-token logits [n_seq, vocab_size] after ``ZebraModel.prefill``."""
        return cast(Tensor, self.lm_head(self.model.prefill(input_ids, new_lens, cache, slots)))

    @torch.no_grad()
    def step(self, input_ids: Tensor, cache: HybridCache, rows: CacheRows) -> Tensor:
        """Return the next-token logits [B, vocab_size] after ``ZebraModel.step``."""
        hidden = self.model.step_without_norm(input_ids, cache, rows)
        return decode_linear(self.lm_head, hidden, self.model.norm)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """generate() calls this before its first forward."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"ZebraForCausalLM.generate: cache_implementation is not supported (the model has "
                f"its own HybridCache), got {generation_config.cache_implementation!r}"
            )
        given = (model_kwargs.pop(name, None) for name in CACHE_NAMES)
        cache = one_cache("ZebraForCausalLM.generate", *given)
        if cache is None and generation_config.use_cache:
            beams, returned = generation_config.num_beams, generation_config.num_return_sequences
            copies = max(beams or 1, returned or 1)
            cache = self.new_cache(batch_size * copies, max_cache_length + 1, growable=True)
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
