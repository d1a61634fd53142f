import math

import pytest
import torch

from zebra.init import convert, spread_layer_types
from zebra.init.convert import fold_head_norm

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
TEACHERS = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "biased": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}  # fmt: skip
IDS = torch.arange(90).view(2, 45)


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_layers_kept_as_attention_reproduce_the_teacher(make_teacher, name: str) -> None:
    family, options = TEACHERS[name]
    teacher = make_teacher(family, **options)
    hybrid = convert(teacher, ["attention"] * 3)
    want = teacher(IDS).logits
    assert (hybrid(IDS, use_cache=False).logits - want).abs().max() < 2e-5 * want.abs().max()


@torch.no_grad()
def test_conversion_copies_all_but_the_mixers(make_teacher) -> None:
    teacher = make_teacher(rope_parameters=LLAMA3)
    hybrid = convert(teacher, ["mla", "mamba2", "attention"])
    ours, theirs = hybrid.state_dict(), teacher.state_dict()
    for name, tensor in theirs.items():
        if ".self_attn." not in name or name.startswith("model.layers.2."):
            assert torch.equal(ours[name], tensor), name
            assert ours[name].data_ptr() != tensor.data_ptr(), name
    for name, out in (("0.mla.out_proj", "0"), ("1.mamba.out_proj", "1")):
        want = theirs[f"model.layers.{out}.self_attn.o_proj.weight"]
        assert torch.equal(ours[f"model.layers.{name}.weight"], want)
    assert hybrid.config.rope_parameters["mla"]["rope_type"] == "yarn"
    assert hybrid.config.rope_parameters["attention"]["rope_type"] == "llama3"
    assert not hybrid.training and all(p.requires_grad for p in hybrid.parameters())
    assert hybrid(IDS, use_cache=False).logits.isfinite().all()


@torch.no_grad()
def test_full_rank_mla_without_positions_is_the_teacher_up_to_its_rope_key(make_teacher) -> None:
    """At a position where nothing is rotated (token 0) only the value path counts: exact."""
    teacher = make_teacher()
    hybrid = convert(teacher, ["mla"] * 3, q_lora_rank=64, kv_lora_rank=64)
    first = IDS[:, :1]
    torch.testing.assert_close(
        hybrid(first, use_cache=False).logits, teacher(first).logits, rtol=1e-4, atol=1e-5
    )


def test_conversion_reads_a_folder_and_keeps_dtype_and_settings(make_teacher, tmp_path) -> None:
    teacher = make_teacher(tie_word_embeddings=True, eos_token_id=7)
    teacher.to(torch.bfloat16).save_pretrained(tmp_path)
    hybrid = convert(tmp_path, {"mla": 1 / 3, "mamba2": 2 / 3})
    assert hybrid.config.layer_types == ["mla", "mamba2", "mamba2"]
    assert hybrid.lm_head.weight is hybrid.model.embed_tokens.weight
    assert hybrid.lm_head.weight.dtype == torch.bfloat16
    assert hybrid.generation_config.eos_token_id == 7
    assert hybrid.config.kv_lora_rank == 32 and hybrid.config.q_lora_rank == 32


def test_seed_fixes_the_conversion(make_teacher) -> None:
    teacher = make_teacher()
    weights = [
        convert(teacher, ["mamba2"] * 3, seed=s).model.layers[2].mamba.in_proj.weight
        for s in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_converted_model_saves_and_loads(make_teacher, tmp_path) -> None:
    hybrid = convert(make_teacher(), ["mla", "mamba2", "attention"], rope_aware=True)
    hybrid.save_pretrained(tmp_path)
    again = type(hybrid).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, hybrid(IDS).logits)


@pytest.mark.parametrize("name", ["biased", "qwen2", "qwen3"])
@torch.no_grad()
def test_biases_and_qk_norm_need_consent(make_teacher, name: str) -> None:
    family, options = TEACHERS[name]
    teacher = make_teacher(family, **options)
    with pytest.raises(ValueError, match="lossy=True"):
        convert(teacher, ["mla", "mamba2", "attention"])
    hybrid = convert(teacher, ["mla", "mamba2", "attention"], lossy=True)
    assert hybrid(IDS, use_cache=False).logits.isfinite().all()


def test_folded_norm_matches_on_average() -> None:
    weight, gain, scale = torch.randn(2 * 16, 64), torch.rand(16) + 0.5, torch.rand(64) + 0.5
    x = torch.randn(4000, 64) * scale
    heads = (x @ weight.T).unflatten(-1, (2, 16))
    want = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True)) * gain
    got = (x @ fold_head_norm(weight, gain, scale).T).unflatten(-1, (2, 16))
    ratio = got.square().mean(0) / want.square().mean(0)
    assert ratio.min() > 0.8 and ratio.max() < 1.25


@pytest.mark.parametrize(
    ("family", "options", "layout", "text"),
    [
        ("gpt2", {"n_positions": 256}, ["mla"] * 3, "model_type must be one of"),
        ("llama", {"mlp_bias": True}, ["mla"] * 3, "biases in the MLP"),
        ("mistral", {"sliding_window": 16}, ["attention"] * 3, "sliding-window"),
        ("llama", {}, "8b-8mla-24m2", "num_hidden_layers = 32"),
        ("llama", {}, "9b", "name must be one of"),
        ("llama", {}, ["mla"] * 2, "num_hidden_layers = 3"),
        ("llama", {}, {"mla": 0.5}, "add up to 1"),
        ("llama", {}, {"gru": 1.0}, "add up to 1"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused(make_teacher, family, options, layout, text) -> None:
    teacher = make_teacher(family, **options)
    with pytest.raises(ValueError, match=text):
        convert(teacher, layout)


def test_yarn_magnitude_is_taken_out_of_the_rope_key(make_teacher) -> None:
    """The same weights under a scaled and an unscaled RoPE: one key is m^2 times the other."""
    keys = []
    for rope in (None, LLAMA3):
        hybrid = convert(make_teacher(rope_parameters=rope), ["mla"] * 3)
        keys.append(hybrid.model.layers[0].mla.kv_a_proj_with_mqa.weight[-32:])
    m = 0.1 * math.log(LLAMA3["factor"]) + 1
    torch.testing.assert_close(keys[1] * m**2, keys[0])


def test_shares_spread_layers_evenly() -> None:
    half = spread_layer_types({"mla": 0.5, "mamba2": 0.5}, 6)
    assert half == ["mla", "mamba2"] * 3
    quarter = spread_layer_types({"mla": 0.25, "mamba2": 0.75}, 16)
    assert [i for i, kind in enumerate(quarter) if kind == "mla"] == [0, 4, 8, 12]
    mixed = spread_layer_types({"mla": 0.25, "attention": 0.25, "mamba2": 0.5}, 8)
    assert [mixed.count(kind) for kind in ("mla", "attention", "mamba2")] == [2, 2, 4]
    assert spread_layer_types({"attention": 1.0}, 3) == ["attention"] * 3
