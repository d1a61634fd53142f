"""From a Transformer checkpoint to a Zebra hybrid that starts from its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from zebra.init.mamba2 import gqa_to_mamba2
from zebra.init.svd import gqa_to_mla
from zebra.layers import rope_frequencies
from zebra.models import LAYER_TYPES, PRESETS, ZebraConfig, ZebraForCausalLM

TEACHERS = ("llama", "mistral", "qwen2", "qwen3")
_PREFIX = {"mla": "mla", "mamba2": "mamba", "attention": "self_attn"}


def convert(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    layout: str | Sequence[str] | Mapping[str, float],
    *,
    q_lora_rank: int | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    rope_aware: bool = True,
    lossy: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> ZebraForCausalLM:
    """Build a hybrid from a teacher: SVD for MLA layers, Q, K, V, O reuse for Mamba2 layers.

    MLPs, norms, embeddings, the output head and "attention" layers are copied.

    Args:
        teacher: Folder, hub name or loaded model: dense Llama, Mistral, Qwen2 or Qwen3.
        layout: A preset name (``ZebraConfig.preset``), the type of every layer, or the share of
            each type, for instance {"mla": 0.25, "mamba2": 0.75}.
        q_lora_rank: Query rank of MLA layers; None takes the preset's, else hidden_size / 2.
        kv_lora_rank: Latent width of MLA layers, a multiple of 16; None takes the preset's, else an
            eighth of the teacher's keys and values.
        qk_rope_head_dim: Rotated channels of MLA layers; None takes the preset's, else half a head.
        rope_aware: Start MLA layers from the teacher's own rotations, see :func:`gqa_to_mla`;
            False is the paper's form (all layers MLA in a small trained Llama: it starts 1.25 nats
            above the teacher instead of 0.62).
        lossy: Convert layers with biases or qk-norm too: biases are dropped, the norms are folded
            into the projections at their expected scale.  Kept "attention" layers lose nothing.
        seed: Of the random parts of Mamba2 layers.
        device: Where the SVDs run; None means where the teacher is.
        progress: Show a progress bar.

    Returns:
        The hybrid in eval mode, with the teacher's dtype, device and generation settings; it shares
        no memory with the teacher.

    Raises:
        ValueError: If the teacher or the layout is not supported; the text says why.
    """
    if not isinstance(teacher, PreTrainedModel):
        teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    traits = _inspect(teacher)
    config = _build_config(teacher, traits, layout, q_lora_rank, kv_lora_rank, qk_rope_head_dim)
    _check_losses(traits, config, lossy)
    weights = {
        name: tensor.detach().clone()
        for name, tensor in teacher.state_dict().items()
        if ".self_attn." not in name and not name.endswith("inv_freq")
    }
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    generator = torch.Generator("cpu").manual_seed(seed)
    kinds = tqdm(config.layer_types, desc="convert", unit="layer", disable=not progress)
    for i, kind in enumerate(kinds):
        layer = teacher.model.layers[i]
        mixer = _convert_mixer(kind, layer, config, generator, rope_aware, device)
        prefix = f"model.layers.{i}.{_PREFIX[kind]}."
        weights |= {prefix + name: tensor for name, tensor in mixer.items()}
    with torch.device("meta"):
        hybrid = ZebraForCausalLM(config)
    missing, unexpected = hybrid.load_state_dict(weights, strict=False, assign=True)
    hybrid.tie_weights()
    missing = [n for n in missing if n != "lm_head.weight" or not config.tie_word_embeddings]
    if missing or unexpected:
        raise ValueError(
            f"convert: the teacher's weights do not fit: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}"
        )
    if teacher.can_generate():
        hybrid.generation_config = teacher.generation_config
    return hybrid.eval()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Traits:
    """What a teacher's attention has beyond four plain projections."""

    head_dim: int
    bias: bool
    out_bias: bool
    qk_norm: bool
    windowed: bool


def _inspect(teacher: PreTrainedModel) -> _Traits:
    """Refuse teachers that we cannot represent and list what their attention has."""
    c = teacher.config
    if c.model_type not in TEACHERS:
        raise ValueError(f"convert: model_type must be one of {TEACHERS}, got {c.model_type!r}")
    if getattr(c, "mlp_bias", False):
        raise ValueError("convert: teachers with biases in the MLP are not supported")
    rope = c.rope_parameters or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("convert: partial_rotary_factor must be 1, got "
                         f"{rope['partial_rotary_factor']}")  # fmt: skip
    attention = teacher.model.layers[0].self_attn
    window = getattr(c, "sliding_window", None)
    return _Traits(
        head_dim=attention.head_dim,
        bias=attention.q_proj.bias is not None,
        out_bias=attention.o_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"),
        windowed=window is not None and window < c.max_position_embeddings,
    )


def _check_losses(traits: _Traits, config: ZebraConfig, lossy: bool) -> None:
    kinds = set(config.layer_types)
    if traits.windowed and "attention" in kinds:
        raise ValueError(
            'convert: the teacher has sliding-window attention, which kept "attention" layers '
            "do not support: choose a layout of mla and mamba2 layers"
        )
    has = {"biases": traits.bias or traits.out_bias, "qk-norm": traits.qk_norm}
    found = [name for name, there in has.items() if there]
    if found and kinds - {"attention"} and not lossy:
        raise ValueError(
            f"convert: the teacher's attention has {' and '.join(found)}, which mla and mamba2 "
            f"layers cannot hold exactly. Pass lossy=True to start from an approximation (biases "
            f"dropped, norms folded into the projections), or keep the layers as attention"
        )


def _build_config(
    teacher: PreTrainedModel,
    traits: _Traits,
    layout: str | Sequence[str] | Mapping[str, float],
    q_lora_rank: int | None,
    kv_lora_rank: int | None,
    qk_rope_head_dim: int | None,
) -> ZebraConfig:
    c, d = teacher.config, traits.head_dim
    groups = c.num_key_value_heads
    ranks: dict[str, Any] = {
        "q_lora_rank": min(c.hidden_size // 2, c.num_attention_heads * d),
        "kv_lora_rank": max(16, 2 * groups * d // 8 // 16 * 16),
        "qk_rope_head_dim": d // 2,
    }
    if isinstance(layout, str):
        preset = ZebraConfig.preset(layout)
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
            if getattr(preset, name) != getattr(c, name):
                raise ValueError(
                    f"convert: layout {layout!r} is for {name} = {getattr(preset, name)}, "
                    f"the teacher has {getattr(c, name)}"
                )
        layer_types = preset.layer_types
        ranks = {name: getattr(preset, name) for name in ranks}
    elif isinstance(layout, Mapping):
        layer_types = spread_layer_types(layout, c.num_hidden_layers)
    else:
        layer_types = list(layout)
    given = {
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": kv_lora_rank,
        "qk_rope_head_dim": qk_rope_head_dim,
    }
    ranks |= {name: value for name, value in given.items() if value is not None}
    return ZebraConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=groups,
        head_dim=d,
        hidden_act=c.hidden_act,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        layer_types=layer_types,
        attention_bias=traits.bias,
        attention_out_bias=traits.out_bias,
        qk_norm=traits.qk_norm,
        rope_parameters=c.rope_parameters,
        pad_token_id=c.pad_token_id,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
        dtype=teacher.dtype,
        **ranks,
    )


def spread_layer_types(ratios: Mapping[str, float], num_layers: int) -> list[str]:
    """Spread layer types evenly by their shares, an MLA layer first.

    Args:
        ratios: Share of each type; they add up to 1.
        num_layers: Number of layers.

    Raises:
        ValueError: If a type is unknown or the shares do not add up.
    """
    if set(ratios) - set(LAYER_TYPES) or abs(sum(ratios.values()) - 1) > 1e-6:
        raise ValueError(
            f"convert: layout must be one of the presets {PRESETS}, a list of layer types, or "
            f"shares of {LAYER_TYPES} that add up to 1, got {dict(ratios)}"
        )
    types, open_places = ["mamba2"] * num_layers, list(range(num_layers))
    counts = {kind: round(ratios.get(kind, 0.0) * num_layers) for kind in ("mla", "attention")}
    if not ratios.get("mamba2"):
        counts["attention"] = num_layers - counts["mla"]
    for kind, count in counts.items():
        chosen = [open_places[i * len(open_places) // count] for i in range(count)]
        for place in chosen:
            types[place] = kind
        open_places = [place for place in open_places if place not in chosen]
    return types


def _convert_mixer(
    kind: str,
    layer: torch.nn.Module,
    config: ZebraConfig,
    generator: torch.Generator,
    rope_aware: bool,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    attention: Any = layer.self_attn
    if kind == "attention":
        return {n: t.detach().clone() for n, t in attention.state_dict().items()}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q, k, v, o = (
        p.weight.detach().clone()
        for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    )
    if config.qk_norm:
        scale: Any = layer.input_layernorm
        q = fold_head_norm(q, attention.q_norm.weight.detach(), scale.weight.detach())
        k = fold_head_norm(k, attention.k_norm.weight.detach(), scale.weight.detach())
    if kind == "mamba2":
        return gqa_to_mamba2(
            q, k, v, o, num_heads=heads, generator=generator, conv_width=config.ssm_conv_width
        )
    home, there = q.device, q.device if device is None else torch.device(device)
    weights = gqa_to_mla(
        q.to(there),
        k.to(there),
        v.to(there),
        o.to(there),
        num_heads=heads,
        num_kv_heads=groups,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        rope_aware=rope_aware,
        rope_gain=_rope_gain(config),
    )
    return {name: w.to(home) for name, w in weights.items()}


def _rope_gain(config: ZebraConfig) -> float:
    """What MLA's cos and sin multiply rope scores by, over what the teacher's do."""
    rope = config.rope_parameters
    _, student = rope_frequencies(config.qk_rope_head_dim, rope["mla"])
    _, teacher = rope_frequencies(config.head_dim, rope["attention"])
    return (student / teacher) ** 2


def fold_head_norm(weight: Tensor, norm_weight: Tensor, input_scale: Tensor) -> Tensor:
    """Approximate RMSNorm_head(W x) by a linear map: rows scaled to the norm's expected output.

    For x = g * n with n of unit variance per channel, E[(W x)_i^2] = |W_i * g|^2; each head is
    divided by the root of its mean over i and multiplied by the norm's weight.

    Args:
        weight: [heads * d, hidden].
        norm_weight: [d].
        input_scale: [hidden], the weight g of the layer norm in front.
    """
    heads = weight.float().unflatten(0, (-1, norm_weight.numel()))
    power = (heads * input_scale.float()).square().sum(-1).mean(-1)  # [heads]
    scale = norm_weight.float() * power[:, None].rsqrt()
    return (heads * scale[..., None]).flatten(0, 1).to(weight.dtype)
