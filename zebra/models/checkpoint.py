"""Reading the checkpoint layout of the amd/Zebra-Llama repositories."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file

from zebra.models.configuration_zebra import ZebraConfig, layer_types_of

_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def official_config(path: str | os.PathLike[str], options: Mapping[str, Any]) -> ZebraConfig | None:
    """Return the configuration of an amd/Zebra-Llama checkpoint, or None where it is not one.

    Such a repository holds the config.json of a Llama beside hybrid_config.json.  Its RoPE is YaRN
    even where hybrid_config.json still says "llama3", and its output head is its own whenever
    lm_head.weight is stored, whatever config.json says about tying.

    Args:
        path: Folder or hub name.
        options: Keyword arguments of from_pretrained; the hub ones are used.

    Raises:
        ValueError: If a weight is missing or an option is not supported.
    """
    hub = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}

    def find(name: str) -> str | None:
        found = cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **hub,
        )
        return None if found is None else str(found)

    hybrid_file, llama_file = find("hybrid_config.json"), find("config.json")
    if hybrid_file is None or llama_file is None:
        return None
    with open(hybrid_file, encoding="utf-8") as f:
        hybrid = json.load(f)
    with open(llama_file, encoding="utf-8") as f:
        llama = json.load(f)
    weights = find("model.safetensors")
    if weights is None and find("pytorch_model.bin") is None:
        raise ValueError(f"{path}: model.safetensors or pytorch_model.bin must be there")
    names = _tensor_names(weights or str(find("pytorch_model.bin")))
    return _build_config(hybrid, llama, names, str(path))


def _build_config(
    hybrid: Mapping[str, Any], llama: Mapping[str, Any], names: set[str], path: str
) -> ZebraConfig:
    heads = hybrid["num_attention_heads"]
    head_dim = llama.get("head_dim") or hybrid["hidden_size"] // heads
    groups = hybrid["d_xb"] // head_dim
    if hybrid["num_key_value_heads"] != groups:
        raise ValueError(
            f"{path}: use_full_kv_head is not supported: MLA has {hybrid['num_key_value_heads']} "
            f"KV heads, Mamba2 has {groups}"
        )
    if hybrid.get("ssm_cfg", {}).get("repeat_kv_before_conv"):
        raise ValueError(f"{path}: ssm_cfg.repeat_kv_before_conv must be false")
    if hybrid.get("layer_rank_list"):
        raise ValueError(f"{path}: layer_rank_list (a rank per layer) is not supported")
    scaling, theta = hybrid.get("rope_scaling") or {}, hybrid.get("rope_theta", 500000.0)
    yarn: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        keys = ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow"]
        keys += ["mscale", "mscale_all_dim"]
        yarn |= {"rope_type": "yarn"} | {k: scaling[k] for k in keys if k in scaling}
    config = ZebraConfig(
        vocab_size=llama["vocab_size"],
        hidden_size=hybrid["hidden_size"],
        intermediate_size=hybrid["intermediate_size"],
        num_hidden_layers=hybrid["n_layer"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        hidden_act=hybrid.get("hidden_act", "silu"),
        max_position_embeddings=hybrid["max_position_embeddings"],
        rms_norm_eps=hybrid["rms_norm_eps"],
        tie_word_embeddings="lm_head.weight" not in names,
        layer_types=layer_types_of(hybrid["mla_layers"], hybrid["n_layer"]),
        kv_lora_rank=hybrid["kv_lora_rank"],
        q_lora_rank=hybrid["q_lora_rank"],
        qk_nope_head_dim=hybrid["qk_nope_head_dim"],
        qk_rope_head_dim=hybrid["qk_rope_head_dim"],
        v_head_dim=hybrid["v_head_dim"],
        use_lora_layer_norm=hybrid.get("use_lora_layer_norm", False),
        rope_parameters={"mla": yarn},
        bos_token_id=llama.get("bos_token_id"),
        eos_token_id=llama.get("eos_token_id"),
        pad_token_id=llama.get("pad_token_id"),
    )
    _check_names(config, names, path)
    return config


def _check_names(config: ZebraConfig, names: set[str], path: str) -> None:
    """Refuse a checkpoint that lacks a weight: transformers would only draw it at random."""
    from zebra.models.modeling_zebra import ZebraForCausalLM  # the model imports this module

    with torch.device("meta"):
        wanted = set(ZebraForCausalLM(config).state_dict())
    if config.tie_word_embeddings:
        wanted.discard("lm_head.weight")
    missing = sorted(wanted - names)
    if missing:
        raise ValueError(
            f"{path}: the checkpoint must hold every weight of its hybrid_config.json; "
            f"{len(missing)} are missing, first {missing[0]}"
        )


def _tensor_names(file: str) -> set[str]:
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as f:
            return set(f.keys())
    return set(torch.load(file, map_location="meta", weights_only=True))
