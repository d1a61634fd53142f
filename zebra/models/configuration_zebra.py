"""ZebraConfig: the sizes of a hybrid, the published layouts, and what its cache costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from zebra.cache import LayerSpec, PagedSpec, StateSpec
from zebra.layers.mlp import ACTIVATIONS
from zebra.layers.rope import rope_frequencies
from zebra.models.cache_name import CACHE_NAMES

LAYER_TYPES = ("mla", "mamba2", "attention")

# Zebra-Llama (arXiv 2505.17272): sizes per base model, MLA layer indices per layout.
_BASES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "q_lora_rank": 1344, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
        "tie_word_embeddings": True, "rope_factor": 32.0,
    },
    "3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
        "tie_word_embeddings": True, "rope_factor": 32.0,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "q_lora_rank": 2048, "kv_lora_rank": 160, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
        "tie_word_embeddings": False, "rope_factor": 8.0,
    },
}  # fmt: skip
_MLA_LAYERS: dict[str, tuple[int, ...]] = {
    "1b-4mla-12m2": (0, 5, 10, 14),
    "1b-6mla-10m2": (0, 2, 5, 8, 11, 14),
    "1b-8mla-8m2": tuple(range(0, 16, 2)),
    "3b-6mla-22m2": (0, 5, 10, 16, 21, 26),
    "3b-8mla-20m2": (0, 3, 7, 10, 14, 18, 22, 26),
    "3b-14mla-14m2": tuple(range(0, 28, 2)),
    "8b-8mla-24m2": (0, 4, 8, 12, 16, 20, 25, 30),
    "8b-16mla-16m2": tuple(range(0, 32, 2)),
}
PRESETS = tuple(_MLA_LAYERS)


class ZebraConfig(PretrainedConfig):
    """Configuration of :class:`ZebraForCausalLM`.

    Args:
        vocab_size: Tokens in the vocabulary.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads (SSM heads in Mamba2 layers).
        num_key_value_heads: KV heads (heads of x and B in Mamba2 layers); None means as many as
            query heads.
        head_dim: Channels per head; None means hidden_size / num_attention_heads.
        hidden_act: Activation of the MLP.
        max_position_embeddings: Longest sequence, in tokens.
        rms_norm_eps: eps of the layer norms and of the gated norm.
        tie_word_embeddings: Share the embedding with the output head.
        layer_types: "mla", "mamba2" or "attention" (kept as in the teacher) for every layer; None
            alternates "mla" and "mamba2".
        kv_lora_rank: Latent width R of MLA layers.
        q_lora_rank: Query rank of MLA layers; None projects queries directly.
        qk_nope_head_dim: Query and key channels without position; None means head_dim minus
            qk_rope_head_dim.
        qk_rope_head_dim: Rotated channels of MLA layers; None means head_dim / 2.
        v_head_dim: Value channels of MLA layers; None means head_dim.
        use_lora_layer_norm: RMSNorm on the latents (False in every published Zebra).
        ssm_state_size: State channels of Mamba2 heads; None means head_dim.
        ssm_conv_width: Taps of the convolution.
        ssm_state_dtype: dtype of cached SSM states: "float32" or "bfloat16".
        attention_bias: Biases on q, k, v of "attention" layers.
        attention_out_bias: Bias on the output projection of "attention" layers.
        qk_norm: RMSNorm on queries and keys of "attention" layers.
        rope_parameters: RoPE of each layer type, {"mla": {...}, "attention": {...}}; or one flat
            dict, the teacher's: "attention" takes it as it is and "mla" takes YaRN with its factor
            and window ("default" where it has no factor). ``rope_scaling`` and ``rope_theta`` are
            understood too.
        cache_page_size: Tokens in a page of the decoding cache.
        initializer_range: Standard deviation of fresh linear weights.
        use_cache: Whether forward returns a cache unless told otherwise.

    Raises:
        ValueError: If the sizes do not fit together; the text names the field.
    """

    model_type = "zebra"
    keys_to_ignore_at_inference = [*CACHE_NAMES]  # noqa: RUF012  (transformers' own form)
    has_no_defaults_at_init = False

    def __init__(
        self,
        vocab_size: int = 128256,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-5,
        tie_word_embeddings: bool = True,
        layer_types: Sequence[str] | None = None,
        kv_lora_rank: int = 128,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        use_lora_layer_norm: bool = False,
        ssm_state_size: int | None = None,
        ssm_conv_width: int = 4,
        ssm_state_dtype: str = "float32",
        attention_bias: bool = False,
        attention_out_bias: bool = False,
        qk_norm: bool = False,
        rope_parameters: Mapping[str, Any] | None = None,
        cache_page_size: int = 64,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        # RoPE is ours alone: transformers would rewrite these while it initialises
        scaling, theta = kwargs.pop("rope_scaling", None), kwargs.pop("rope_theta", None)
        super().__init__(**kwargs)
        # transformers 5.23 no longer sets the token ids from keyword arguments of its own
        self.pad_token_id, self.bos_token_id = pad_token_id, bos_token_id
        self.eos_token_id = eos_token_id
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.intermediate_size, self.num_hidden_layers = intermediate_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = (
            num_attention_heads if num_key_value_heads is None else num_key_value_heads
        )
        _positive(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
        )
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act, self.rms_norm_eps = hidden_act, rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.tie_word_embeddings = tie_word_embeddings
        self.kv_lora_rank, self.q_lora_rank = kv_lora_rank, q_lora_rank
        self.qk_rope_head_dim = self.head_dim // 2 if qk_rope_head_dim is None else qk_rope_head_dim
        self.qk_nope_head_dim = (
            self.head_dim - self.qk_rope_head_dim if qk_nope_head_dim is None else qk_nope_head_dim
        )
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        self.use_lora_layer_norm = use_lora_layer_norm
        self.ssm_state_size = self.head_dim if ssm_state_size is None else ssm_state_size
        self.ssm_conv_width, self.ssm_state_dtype = ssm_conv_width, ssm_state_dtype
        self.attention_bias, self.attention_out_bias = attention_bias, attention_out_bias
        self.qk_norm, self.cache_page_size = qk_norm, cache_page_size
        self.initializer_range, self.use_cache = initializer_range, use_cache
        if layer_types is None:
            layer_types = [LAYER_TYPES[i % 2] for i in range(num_hidden_layers)]
        self.layer_types = list(layer_types)
        self.rope_parameters = _rope_by_layer_type(
            scaling if rope_parameters is None else rope_parameters, theta, max_position_embeddings
        )
        self.validate()

    def validate(self) -> None:
        """Check that the sizes fit together.

        Raises:
            ValueError: If they do not; the text names the field.
        """
        if not hasattr(self, "rope_parameters"):  # transformers calls this before we are built
            return
        _positive(
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            kv_lora_rank=self.kv_lora_rank,
            q_lora_rank=1 if self.q_lora_rank is None else self.q_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            v_head_dim=self.v_head_dim,
            ssm_state_size=self.ssm_state_size,
            ssm_conv_width=self.ssm_conv_width - 1,
            cache_page_size=self.cache_page_size,
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"ZebraConfig: num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(
                f"ZebraConfig: layer_types must hold only {LAYER_TYPES}, got {unknown}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"ZebraConfig: layer_types must hold num_hidden_layers = {self.num_hidden_layers} "
                f"entries, got {len(self.layer_types)}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"ZebraConfig: hidden_act must be one of {sorted(ACTIVATIONS)}, "
                f"got {self.hidden_act!r}"
            )
        if self.ssm_state_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"ZebraConfig: ssm_state_dtype must be 'float32' or 'bfloat16', "
                f"got {self.ssm_state_dtype!r}"
            )
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ValueError(
                f"ZebraConfig: qk_rope_head_dim must be even and positive, "
                f"got {self.qk_rope_head_dim}"
            )
        for kind, dim in (("mla", self.qk_rope_head_dim), ("attention", self.head_dim)):
            if kind in self.layer_types:
                rope_frequencies(dim, self.rope_parameters[kind])

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ZebraConfig:
        """Return one of the eight published layouts.

        Args:
            name: One of ``zebra.models.PRESETS``, for instance "8b-8mla-24m2".
            **overrides: Fields to change.

        Raises:
            ValueError: If the name is unknown.
        """
        if name not in _MLA_LAYERS:
            raise ValueError(f"ZebraConfig.preset: name must be one of {PRESETS}, got {name!r}")
        fields = copy.deepcopy(_BASES[name.partition("-")[0]])
        factor = fields.pop("rope_factor")
        fields["layer_types"] = layer_types_of(_MLA_LAYERS[name], fields["num_hidden_layers"])
        fields["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        fields |= {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
        return cls(**(fields | overrides))

    def cache_specs(self) -> list[LayerSpec]:
        """Say what every layer stores while decoding."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        specs: dict[str, LayerSpec] = {
            "mla": PagedSpec(self.kv_lora_rank + self.qk_rope_head_dim),
            "attention": PagedSpec(2 * groups * self.head_dim),
            "mamba2": StateSpec(
                groups * (self.head_dim + self.ssm_state_size) + heads * self.ssm_state_size,
                self.ssm_conv_width,
                heads,
                self.head_dim,
                self.ssm_state_size,
            ),
        }
        return [specs[kind] for kind in self.layer_types]


def layer_types_of(mla_layers: Sequence[int], num_layers: int) -> list[str]:
    """List the layer types of a layout given by its MLA indices; all others are Mamba2."""
    return ["mla" if i in set(mla_layers) else "mamba2" for i in range(num_layers)]


def kv_cache_report(
    config: ZebraConfig,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Say what a sequence costs while decoding, and what the weights count.

    Args:
        config: The hybrid.
        dtype: Of latents, keys, values and convolution windows.
        state_dtype: Of the SSM states; None means config.ssm_state_dtype.

    Returns:
        bytes_per_token: Bytes cached for every token, all layers.
        percent_of_teacher: That over what grouped-query attention in every layer would store.
        state_bytes_per_sequence: Bytes that do not grow with the sequence (conv window and SSM
            state of Mamba2 layers).
        parameters: Number of weights, a tied output head counted once.
    """
    state_dtype = getattr(torch, config.ssm_state_dtype) if state_dtype is None else state_dtype
    width, state = 0, 0
    for spec in config.cache_specs():
        if isinstance(spec, PagedSpec):
            width += spec.width
        else:
            state += spec.conv_dim * (spec.conv_width - 1) * dtype.itemsize
            state += spec.num_heads * spec.head_dim * spec.state_size * state_dtype.itemsize
    teacher = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    return {
        "bytes_per_token": width * dtype.itemsize,
        "percent_of_teacher": 100 * width / teacher,
        "state_bytes_per_sequence": state,
        "parameters": _count_parameters(config),
    }


def _count_parameters(c: ZebraConfig) -> int:
    hidden, heads, groups, d = (
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
    )
    qk, rank = c.qk_nope_head_dim + c.qk_rope_head_dim, c.q_lora_rank
    queries = hidden * heads * qk if rank is None else rank * (hidden + heads * qk)
    mla = (
        queries
        + hidden * (c.kv_lora_rank + c.qk_rope_head_dim)
        + c.kv_lora_rank * groups * (c.qk_nope_head_dim + c.v_head_dim)
        + heads * c.v_head_dim * hidden
        + c.use_lora_layer_norm * (c.kv_lora_rank + (rank or 0))
    )
    inner, state = heads * d, c.ssm_state_size
    conv = groups * (d + state) + heads * state
    mamba2 = (
        hidden * (inner + conv + heads)
        + conv * (c.ssm_conv_width + 1)
        + 3 * heads
        + inner
        + inner * hidden
    )
    attention = (
        hidden * d * (2 * heads + 2 * groups)
        + c.attention_bias * d * (heads + 2 * groups)
        + c.attention_out_bias * hidden
        + c.qk_norm * 2 * d
    )
    mixer = {"mla": mla, "mamba2": mamba2, "attention": attention}
    layers = sum(mixer[kind] for kind in c.layer_types)
    layers += c.num_hidden_layers * (3 * hidden * c.intermediate_size + 2 * hidden)
    embeddings = c.vocab_size * hidden * (1 if c.tie_word_embeddings else 2)
    return layers + embeddings + hidden


def _positive(**fields: int) -> None:
    for name, value in fields.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"ZebraConfig: {name} must be a positive integer, got {value!r}")


def _rope_by_layer_type(
    given: Mapping[str, Any] | None, theta: float | None, max_positions: int
) -> dict[str, dict[str, Any]]:
    """Bring every accepted form of RoPE parameters to {"mla": ..., "attention": ...}."""
    given = copy.deepcopy(dict(given or {}))
    nested = {kind: given.pop(kind) for kind in ("mla", "attention") if kind in given}
    if nested:
        nested = {kind: _complete(value, theta, max_positions) for kind, value in nested.items()}
        attention = nested.get("attention") or nested["mla"]
        return {"mla": nested.get("mla") or yarn_of(attention), "attention": attention}
    teacher = _complete(given, theta, max_positions)
    return {"mla": yarn_of(teacher), "attention": teacher}


def _complete(given: Mapping[str, Any], theta: float | None, max_positions: int) -> dict[str, Any]:
    rope = {key: value for key, value in given.items() if value is not None}
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", 10000.0 if theta is None else theta)
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", max_positions)
    return rope


def yarn_of(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Derive the RoPE of MLA layers from the teacher's: YaRN with its factor and window."""
    rope = {"rope_type": "default", "rope_theta": teacher["rope_theta"]}
    if teacher["rope_type"] == "yarn":
        return dict(teacher)
    if teacher["rope_type"] == "llama3":
        keys = ("factor", "original_max_position_embeddings")
        rope |= {"rope_type": "yarn"} | {key: teacher[key] for key in keys if key in teacher}
    elif teacher["rope_type"] != "default":
        rope = dict(teacher)
    return rope
