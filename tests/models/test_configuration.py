import json

import pytest
import torch
from transformers import AutoConfig

from zebra.cache import HybridCache, PagedLayer
from zebra.models import PRESETS, ZebraConfig, ZebraForCausalLM, kv_cache_report

# Zebra-Llama: layout -> (weights tied, weights untied, KV per cent, KV bytes per token in bf16)
PUBLISHED = {
    "1b-4mla-12m2": (1_285_700_736, 1_548_369_024, 3.906, 1_280),
    "1b-6mla-10m2": (1_276_425_152, 1_539_093_440, 5.859, 1_920),
    "1b-8mla-8m2": (1_267_149_568, 1_529_817_856, 7.813, 2_560),
    "3b-6mla-22m2": (3_389_592_112, 3_783_594_544, 2.009, 2_304),
    "3b-8mla-20m2": (3_359_502_752, 3_753_505_184, 2.679, 3_072),
    "3b-14mla-14m2": (3_269_234_672, 3_663_237_104, 4.688, 5_376),
    "8b-8mla-24m2": (8_379_095_296 - 128256 * 4096, 8_379_095_296, 2.734, 3_584),
    "8b-16mla-16m2": (8_185_746_944 - 128256 * 4096, 8_185_746_944, 5.469, 7_168),
}


def test_presets_are_the_published_layouts() -> None:
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_published_parameter_count(name: str) -> None:
    for tied, want in zip((True, False), PUBLISHED[name][:2], strict=True):
        config = ZebraConfig.preset(name, tie_word_embeddings=tied)
        with torch.device("meta"):
            model = ZebraForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == want
        assert kv_cache_report(config)["parameters"] == want


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_published_cache_size(name: str) -> None:
    report = kv_cache_report(ZebraConfig.preset(name))
    assert report["percent_of_teacher"] == pytest.approx(PUBLISHED[name][2], abs=5e-4)
    assert report["bytes_per_token"] == PUBLISHED[name][3]


def test_only_the_8b_presets_untie_the_output_head() -> None:
    assert {n for n in PRESETS if not ZebraConfig.preset(n).tie_word_embeddings} == {
        "8b-8mla-24m2",
        "8b-16mla-16m2",
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_lora_layer_norm": True},
        {"q_lora_rank": None},
        {"layer_types": ["attention"] * 4, "attention_bias": True, "attention_out_bias": True},
        {"layer_types": ["attention"] * 4, "qk_norm": True},
        {"ssm_state_size": 32, "ssm_conv_width": 3},
        {"qk_nope_head_dim": 16, "v_head_dim": 80, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_parameter_formula_counts_every_option(make_config, overrides) -> None:
    config = make_config(**overrides)
    with torch.device("meta"):
        model = ZebraForCausalLM(config)
    assert kv_cache_report(config)["parameters"] == sum(p.numel() for p in model.parameters())


def test_report_counts_the_bytes_that_the_cache_allocates(make_config) -> None:
    config = make_config()
    cache = HybridCache(config.cache_specs(), max_batch=1, max_length=8, page_size=4)
    token = state = 0
    for layer in cache.layers:
        if isinstance(layer, PagedLayer):
            token += layer.pages[0, 0].numel() * layer.pages.itemsize
        else:
            state += layer.conv_state.nbytes + layer.ssm_state.nbytes
    report = kv_cache_report(config)
    assert report["bytes_per_token"] == token
    assert report["state_bytes_per_sequence"] == state
    half = kv_cache_report(config, state_dtype=torch.bfloat16)["state_bytes_per_sequence"]
    assert half < report["state_bytes_per_sequence"]


def test_config_survives_saving(make_config, tmp_path) -> None:
    config = make_config()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "zebra"
    for loaded in (ZebraConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, ZebraConfig)
        assert loaded.layer_types == config.layer_types
        assert loaded.rope_parameters == config.rope_parameters
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_default_config_is_valid() -> None:
    assert ZebraConfig().layer_types[:3] == ["mla", "mamba2", "mla"]


def test_flat_rope_is_the_teachers_and_mla_takes_yarn_from_it(make_config) -> None:
    rope = make_config().rope_parameters
    assert rope["attention"]["rope_type"] == "llama3"
    assert rope["mla"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def test_rope_scaling_and_theta_are_understood(make_config) -> None:
    config = make_config(
        rope_parameters=None,
        rope_theta=5000.0,
        rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    )
    assert config.rope_parameters["mla"]["rope_theta"] == 5000.0
    assert config.rope_parameters["mla"]["rope_type"] == "yarn"


def test_rope_without_scaling_stays_unscaled_in_mla(make_config) -> None:
    config = make_config(rope_parameters={"rope_theta": 5000.0})
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    assert config.rope_parameters == {"mla": plain, "attention": plain}


def test_nested_rope_is_kept_per_layer_type(make_config) -> None:
    nested = {
        "mla": {"rope_type": "default", "rope_theta": 1.5e4},
        "attention": {"rope_type": "default", "rope_theta": 2.5e4},
    }
    assert make_config(rope_parameters=nested).rope_parameters == nested


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"layer_types": ["mla"] * 3}, "layer_types must hold num_hidden_layers = 4"),
        ({"layer_types": ["mla"] * 3 + ["rnn"]}, "rnn"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"qk_rope_head_dim": 31}, "qk_rope_head_dim must be even"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a positive integer"),
        ({"q_lora_rank": 0}, "q_lora_rank must be a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of"),
        ({"ssm_state_dtype": "float16"}, "ssm_state_dtype"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "needs factor"),
        ({"qk_rope_head_dim": 64, "head_dim": 64}, "qk_nope_head_dim must be a positive integer"),
    ],
    ids=str,
)
def test_bad_config_is_refused_by_name(make_config, overrides, text) -> None:
    with pytest.raises(ValueError, match=text):
        make_config(**overrides)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="8b-8mla-24m2"):
        ZebraConfig.preset("8b")
