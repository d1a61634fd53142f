import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from zebra.models import ZebraForCausalLM, ZebraModel

FP32 = ("A_log", "D", "dt_bias")


def ids(device: str) -> torch.Tensor:
    return torch.arange(20, device=device).view(2, 10)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saved_model_loads_to_the_same_logits(make_model, device, tied, tmp_path) -> None:
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    want = model(ids(device), use_cache=False).logits
    for loader in (ZebraForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path).to(device)
        assert isinstance(loaded, ZebraForCausalLM) and not loaded.training
        assert torch.equal(loaded(ids(device), use_cache=False).logits, want)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert isinstance(AutoModel.from_pretrained(tmp_path), ZebraModel)


def test_loading_in_bf16_keeps_the_decay_parameters_in_fp32(make_model, tmp_path) -> None:
    make_model().save_pretrained(tmp_path)
    loaded = ZebraForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in loaded.named_parameters():
        want = torch.float32 if name.rsplit(".")[-1] in FP32 else torch.bfloat16
        assert p.dtype == want, name


def test_model_on_meta_infers_shapes(make_config) -> None:
    with torch.device("meta"):
        model = ZebraForCausalLM(make_config())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_fresh_model_is_initialised_by_layer_kind(make_config) -> None:
    torch.manual_seed(0)
    model = ZebraForCausalLM(make_config())
    mamba = model.model.layers[1].mamba
    assert mamba.in_proj.weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert mamba.conv1d.weight.abs().max() <= 0.5 and mamba.conv1d.bias.abs().max() <= 0.5
    assert (mamba.A_log.exp() >= 1).all() and (mamba.A_log.exp() <= 16).all()
    assert torch.equal(mamba.norm.weight, torch.ones_like(mamba.norm.weight))


def write_official(
    model: ZebraForCausalLM, folder: Any, *, scaling_type: str, head: bool, **hybrid: Any
) -> None:
    """Write a checkpoint as the amd/Zebra-Llama repositories lay it out."""
    c = model.config
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    if head:
        tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    for i, kind in enumerate(c.layer_types):
        if kind == "mla":  # their inference code saves views of kv_b_proj beside it
            tensors[f"model.layers.{i}.mla.wk_b"] = torch.zeros(4, 32, 16)
            tensors[f"model.layers.{i}.mla.wv_b"] = torch.zeros(4, 64, 16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "head_dim": c.head_dim,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }
    options = {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "hidden_act": "silu",
        "n_layer": c.num_hidden_layers,
        "mla_layers": [i for i, kind in enumerate(c.layer_types) if kind == "mla"],
        "rms_norm_eps": c.rms_norm_eps,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "kv_lora_rank": c.kv_lora_rank,
        "q_lora_rank": c.q_lora_rank,
        "use_lora_layer_norm": False,
        "use_full_kv_head": False,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "qk_nope_head_dim": c.qk_nope_head_dim,
        "qkv_rank_divisor": 8,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_type": scaling_type,
        },
        "rope_type": "yarn",
        "attention_bias": False,
        "d_inner": c.num_attention_heads * c.head_dim,
        "d_xb": c.num_key_value_heads * c.head_dim,
        "ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 64, "repeat_kv_before_conv": False},
        "a_key_of_a_later_release": 1,
    }
    (folder / "config.json").write_text(json.dumps(llama))
    (folder / "hybrid_config.json").write_text(json.dumps(options | hybrid))


LAYERS = ["mla", "mamba2", "mla", "mamba2"]


@pytest.mark.parametrize("scaling_type", ["yarn", "llama3"])
@pytest.mark.parametrize("head", [True, False])
@torch.no_grad()
def test_official_checkpoint_loads(make_model, scaling_type, head, tmp_path) -> None:
    model = make_model(layer_types=LAYERS, tie_word_embeddings=not head).cpu()
    write_official(model, tmp_path, scaling_type=scaling_type, head=head)
    loaded = ZebraForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == LAYERS
    assert loaded.config.rope_parameters["mla"] == model.config.rope_parameters["mla"]
    assert loaded.config.tie_word_embeddings != head
    assert loaded.config.eos_token_id == [2, 3]
    want = model(ids("cpu"), use_cache=False).logits
    assert torch.equal(loaded(ids("cpu"), use_cache=False).logits, want)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mla_layers": [0, 1]}, "are missing, first model.layers.1.mla"),
        ({"use_full_kv_head": True, "num_key_value_heads": 4}, "use_full_kv_head"),
        ({"layer_rank_list": [1, 2]}, "layer_rank_list"),
        ({"ssm_cfg": {"repeat_kv_before_conv": True}}, "repeat_kv_before_conv"),
    ],
    ids=str,
)
def test_official_checkpoint_that_does_not_fit_is_refused(
    make_model, changes, text, tmp_path
) -> None:
    model = make_model(layer_types=LAYERS).cpu()
    write_official(model, tmp_path, scaling_type="yarn", head=True, **changes)
    with pytest.raises(ValueError, match=text):
        ZebraForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_merged_queries_are_saved_as_one_projection(make_model, device, tmp_path) -> None:
    model = make_model()
    want = model(ids(device), use_cache=False).logits
    model.merge_queries()
    model.save_pretrained(tmp_path)
    again = ZebraForCausalLM.from_pretrained(tmp_path).eval().to(device)
    assert again.config.q_lora_rank is None
    assert not any("q_a_proj" in name for name in again.state_dict())
    got = again(ids(device), use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
