"""A composite accepts and refuses what the compiled operator does, in the same words."""

import pytest
import torch
from torch import Tensor

from zebra import ops
from zebra.ops import attention, conv, decode, kl, linear, norm, project, ssd, step
from zebra.ops._check import Check

B, T, H, G = 2, 5, 4, 2  # sequences, tokens, heads, KV heads
R, E, Dn, Dv = 6, 4, 3, 2  # latent width, rotated, plain key and value channels
P, N, W, K = 3, 4, 4, 8  # head and state channels, taps, hidden width


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def rms_norm(rand):
    return {"x": rand(B, K), "weight": rand(K), "residual": rand(B, K)}


def causal_conv1d(rand):
    states = {"initial_state": rand(2, K, W - 1), "cu_seqlens": int32(0, 2, T)}
    return {"x": rand(1, T, K), "weight": rand(K, W), "bias": rand(K), **states}


def causal_conv1d_step(rand):
    state = {"conv_state": rand(B + 1, K, W - 1), "state_indices": int32(1, 0)}
    return {"x": rand(B, K), "weight": rand(K, W), "bias": rand(K), **state}


def ssd_scan(rand):
    vectors = {"D": rand(H), "dt_bias": rand(H), "norm_weight": rand(H * P)}
    return {
        "x": rand(1, T, G, P),
        "dt": rand(1, T, H),
        "A": -torch.rand(H),
        "B": rand(1, T, G, N),
        "C": rand(1, T, H, N),
        "z": rand(1, T, H, P),
        "initial_state": torch.randn(2, H, P, N),
        "cu_seqlens": int32(0, 2, T),
        **vectors,
    }


def mamba2_step(rand):
    channels = G * (P + N) + H * N
    return {
        "zxbcdt": rand(B, H * P + channels + H),
        "conv_state": rand(B + 1, channels, W - 1),
        "ssm_state": torch.randn(B + 1, H, P, N),
        "conv_weight": rand(channels, W),
        "conv_bias": rand(channels),
        "dt_bias": rand(H),
        "A": -torch.rand(H),
        "D": rand(H),
        "norm_weight": rand(H * P),
        "n_groups": G,
        "state_indices": int32(1, 0),
    }


def mla_project(rand):
    return {
        "hidden": rand(B, T, K),
        "q_a_weight": rand(5, K),
        "q_b_weight": rand(H * (Dn + E), 5),
        "kv_a_weight": rand(R + E, K),
        "cos": torch.randn(9, E // 2),
        "sin": torch.randn(9, E // 2),
        "positions": torch.arange(T).repeat(B, 1),
        "num_heads": H,
        "q_a_norm_weight": rand(5),
        "kv_a_norm_weight": rand(R),
    }


def mla_project_append(rand):
    slots = torch.arange(B * T).view(B, T)
    cache, gain = rand(5, 3, R + E), rand(K)
    return {**mla_project(rand), "cache": cache, "slot_mapping": slots, "input_norm_weight": gain}


def mla_attention(rand):
    packed = {"cu_seqlens": int32(0, 2, T), "scale": 1.0}
    kv, k_rope = rand(1, T, G, Dn + Dv), rand(1, T, E)
    return {"q": rand(1, T, H, Dn + E), "kv": kv, "k_rope": k_rope, **packed}


def mla_decode(rand):
    tables = {"block_table": int32(0, 2, 1, 3).view(2, 2), "seq_lens": int32(4, 3)}
    q, cache, weight = rand(B, 1, H, Dn + E), rand(5, 3, R + E), rand(G * (Dn + Dv), R)
    heads = {"scale": 1.0, "kv_b_weight": weight, "num_kv_heads": G}
    return {"q": q, "cache": cache, **tables, **heads}


def mla_decode_latent(rand):
    absent = {"kv_b_weight": None, "num_kv_heads": 0, "kv_lora_rank": R}
    return {**mla_decode(rand), "q": rand(B, 1, H, R + E), **absent}


def linear_decode(rand):
    rows = {"weight": rand(6, K), "bias": rand(6), "residual": rand(B, 3)}
    return {"x": rand(B, K), "norm_weight": rand(K), "activation": "swiglu", **rows}


def linear_decode_apart(rand):
    rows = {"weight": rand(3, K), "up_weight": rand(3, K), "bias": rand(6)}
    return {"x": rand(B, K), "activation": "swiglu", **rows}


def fused_kl_div(rand):
    student = {"student_hidden": rand(T, K), "student_weight": rand(9, K)}
    return {**student, "teacher_hidden": rand(T, 6), "teacher_weight": rand(9, 6)}


OPERATORS = [
    (rms_norm, ops.rms_norm, norm._rms_norm_composite),
    (causal_conv1d, ops.causal_conv1d, conv._causal_conv1d_composite),
    (causal_conv1d_step, ops.causal_conv1d_step, conv._causal_conv1d_step_composite),
    (ssd_scan, ops.ssd_scan, ssd._ssd_scan_composite),
    (mamba2_step, ops.mamba2_step, step._mamba2_step_composite),
    (mla_project, ops.mla_project, project._mla_project_composite),
    (mla_project_append, ops.mla_project_append, project._mla_project_append_composite),
    (mla_attention, ops.mla_attention, attention._mla_attention_composite),
    (mla_decode, ops.mla_decode, decode._mla_decode_composite),
    (mla_decode_latent, ops.mla_decode, decode._mla_decode_composite),
    (linear_decode, ops.linear_decode, linear._linear_decode_composite),
    (linear_decode_apart, ops.linear_decode, linear._linear_decode_composite),
    (fused_kl_div, ops.fused_kl_div, kl._fused_kl_div_composite),
]

# What is done to one argument.  Values stay: only the host's operators may read them.
CHANGES = {
    "rank": lambda t: t[None],
    "scalar": lambda t: t.flatten()[0],
    "none": lambda t: t[:0],
    "fewer": lambda t: t[:-1] if t.is_floating_point() else t[:0],
    "narrower": lambda t: t[..., :-1] if t.is_floating_point() else t[None],
    "narrow": lambda t: t[..., :1] if t.is_floating_point() else t[None],
    "empty": lambda t: t[..., :0] if t.is_floating_point() else t[None],
    "steps": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "expanded": lambda t: t[:1].expand_as(t) if t.is_floating_point() else t,
    "float32": Tensor.float,
    "float64": Tensor.double,
    "float16": Tensor.half,
    "int32": Tensor.int,
    "int64": Tensor.long,
    "bool": Tensor.bool,
}
# Without a slot every index is out of range, which is a matter of values.
VALUES = {("cache", "none"), ("conv_state", "none")}


def refusal(call, args):
    try:
        call(**args)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o[0].__name__)
def test_composite_refuses_what_the_operator_refuses(operator, dtype):
    make, compiled, composite = operator
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def arguments():
        torch.manual_seed(0)
        args = make(lambda *shape: torch.randn(shape).to(dtype))
        states = {k: args[k].to(wide) for k in ("A", "ssm_state") if k in args}
        if make is ssd_scan:
            states["initial_state"] = args["initial_state"].to(wide)
        return {**args, **states}

    assert refusal(compiled, arguments()) is None and refusal(composite, arguments()) is None
    for name in [k for k, v in arguments().items() if isinstance(v, Tensor)]:
        refused = 0
        for how, change in CHANGES.items():
            if (name, how) in VALUES:
                continue
            args, again = arguments(), arguments()
            args[name], again[name] = change(args[name]), change(again[name])
            want = refusal(compiled, args)
            assert refusal(composite, again) == want, (name, how)
            if want is not None:
                refused += 1
                assert want.startswith("zebra::"), (name, how)
        assert refused >= 5, name


def test_check_names_the_device_of_a_tensor_that_lies_elsewhere():
    weight, message = torch.empty(2, 4, device="meta").t(), "zebra::f: weight must be on cpu, got "
    with pytest.raises(RuntimeError) as error:
        Check("f").same_device("weight", weight, torch.empty(1))
    assert str(error.value) == message + "[4, 2] float32 on meta, strides [1, 4]"
