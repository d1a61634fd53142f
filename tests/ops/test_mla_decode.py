"""mla_decode against its fp64 truth, on every device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_decode_cases import GARBAGE, check, make, wide
from refusals import assert_rejected

from zebra import ops
from zebra.ops import reference
from zebra.ops.decode import _mla_decode_composite
from zebra.testing import relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# H, G, Dn, E, Dv, R
ZEBRA = {
    "1b": (32, 8, 32, 32, 64, 128),
    "3b": (24, 8, 64, 64, 128, 128),
    "8b": (32, 8, 64, 64, 128, 160),
}
ODD = {
    "one_head": (1, 1, 8, 0, 8, 16),
    "three_heads": (3, 3, 16, 32, 8, 48),
    "group_of_eight": (24, 3, 7, 2, 5, 33),
    "no_nope": (4, 2, 0, 64, 16, 96),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", ZEBRA.values(), ids=ZEBRA)
def test_mla_decode_matches_reference_at_zebra_shapes(dims, dtype, device):
    check(make(dims, [1, 100, 700, 64], dtype, device, page=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dims", ODD.values(), ids=ODD)
def test_mla_decode_matches_reference_at_odd_shapes(dims, tokens, dtype, device):
    check(make(dims, [0, 1, 31, 33, 70], dtype, device, tokens))


@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("tokens", [1, 4])
def test_mla_decode_matches_reference_at_every_edge_of_a_page(page, tokens, device):
    lengths = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    check(make(ODD["three_heads"], lengths, torch.float32, device, tokens, page))


@pytest.mark.parametrize("tokens", [1, 3])
def test_mla_decode_matches_reference_with_latent_queries(tokens, device):
    check(make(ZEBRA["8b"], [5, 0, 600], torch.bfloat16, device, tokens, latent=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mla_decode_composite_matches_reference(dtype, monkeypatch):
    args = make(ODD["three_heads"], [0, 1, 2, 40, 65], dtype, "cpu", tokens=3)
    check(args, _mla_decode_composite)
    monkeypatch.setattr("zebra.ops.decode._CHUNK_ELEMENTS", 2 * 5 * 16 * 80)  # two pages a chunk
    check(args, _mla_decode_composite)
    check(make(ODD["one_head"], [0, 9], dtype, "cpu", latent=True), _mla_decode_composite)


def test_mla_decode_composite_stays_finite_without_pages():
    args = make(ODD["one_head"], [0, 0], torch.float32, "cpu")
    args["cache"] = args["cache"][:0]
    for op in (_mla_decode_composite, ops.mla_decode):
        o, lse = op(**args)
        assert (o == 0).all() and (lse == float("-inf")).all()


@settings(max_examples=40, deadline=None)
@given(
    group=st.integers(1, 9),
    G=st.integers(1, 5),
    Dn=st.integers(1, 20),
    half=st.integers(0, 12),
    Dv=st.integers(4, 20),
    R=st.integers(4, 70),
    tokens=st.integers(1, 6),
    page=st.integers(1, 70),
    lengths=st.lists(st.integers(0, 140), min_size=0, max_size=4),
)
def test_mla_decode_matches_reference_at_any_shape(
    group, G, Dn, half, Dv, R, tokens, page, lengths
):
    dims = (group * G, G, Dn, 2 * half, Dv, R)
    args = make(dims, lengths, torch.float32, "cpu", tokens, page)
    truth = reference.mla_decode(**wide(args))
    # Not against eager: a few numbers may cancel, or come out exact, in one of the two by chance.
    for g, t in zip(ops.mla_decode(**args), truth, strict=True):
        assert relative_error(g, t) < 1e-5


def test_mla_decode_without_keys_gives_zero_and_minus_infinity(device):
    o, lse = ops.mla_decode(**make(ZEBRA["1b"], [0, 2, 0], torch.bfloat16, device, tokens=4))
    assert (o[[0, 2]] == 0).all() and (lse[[0, 2]] == float("-inf")).all()
    assert (o[1, :2] == 0).all() and (lse[1, :2] == float("-inf")).all()
    assert o[1, 2:].abs().sum() > 0 and lse[1, 2:].isfinite().all()


def test_mla_decode_accepts_an_empty_batch(device):
    o, lse = ops.mla_decode(**make(ZEBRA["1b"], [], torch.float32, device))
    assert o.shape == (0, 1, 32, 64) and lse.shape == (0, 1, 32)


def test_mla_decode_equals_expanded_attention(device):
    lengths, T = [40, 40], 40
    args = make(ZEBRA["8b"], lengths, torch.float64, "cpu", tokens=T)
    R, G = 160, 8
    latent = args["cache"][args["block_table"][:, :3].long()].flatten(1, 2)[:, :40]
    kv = (latent[..., :R] @ args["kv_b_weight"].t()).unflatten(-1, (G, -1))
    want = reference.mla_attention(args["q"], kv, latent[..., R:], args["scale"])
    args32 = {
        k: v.float().to(device) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in args.items()
    }
    args32 |= {k: args[k].to(device) for k in ("block_table", "seq_lens")}
    for got, w in zip(ops.mla_decode(**args32), want, strict=True):
        assert relative_error(got, w) < 1e-5


def test_mla_decode_does_not_depend_on_the_order_of_pages(device):
    args = make(ZEBRA["3b"], [100, 37], torch.bfloat16, device, tokens=2)
    want = ops.mla_decode(**args)
    order = torch.randperm(args["cache"].size(0), device=device)
    moved = torch.empty_like(args["cache"])
    moved[order] = args["cache"]
    table = args["block_table"].clone()
    used = (table >= 0) & (table < order.numel())
    table[used] = order[table[used].long()].int()
    got = ops.mla_decode(**args | {"cache": moved, "block_table": table})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_mla_decode_does_not_depend_on_the_page_size(device):
    args = make(ZEBRA["3b"], [128], torch.bfloat16, device, page=64, spare=0)
    args["block_table"] = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    args["cache"] = torch.randn_like(args["cache"])
    want = ops.mla_decode(**args)
    for page in (1, 8, 32):
        cache = args["cache"].view(-1, page, args["cache"].size(2))
        table = torch.arange(64 // page, 192 // page, dtype=torch.int32, device=device)[None]
        got = ops.mla_decode(**args | {"cache": cache, "block_table": table})
        assert all(relative_error(a, b) < 1e-3 for a, b in zip(got, want, strict=True))


def test_mla_decode_reads_strided_inputs_in_place(device):
    args = make(ODD["three_heads"], [33, 20], torch.float32, device, tokens=2)
    want = ops.mla_decode(**args)
    cache = args["cache"]
    room = torch.full((cache.size(0), 19, cache.size(2) + 7), float("nan"), device=device)
    room[:, 2:18, 3:-4] = cache
    q = torch.randn(2, 2, 3, 60, device=device)
    q[..., 5 : 5 + args["q"].size(3)] = args["q"]
    table = torch.full((2, 9), GARBAGE, dtype=torch.int32, device=device)
    table[:, : args["block_table"].size(1)] = args["block_table"]
    strided = {
        "cache": room[:, 2:18, 3:-4],
        "q": q[..., 5 : 5 + args["q"].size(3)],
        "block_table": table[:, : args["block_table"].size(1)],
    }
    got = ops.mla_decode(**args | strided)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_mla_decode_halves_merge_to_the_whole(device):
    args = make(ZEBRA["1b"], [1000], torch.float32, device)
    o, lse = ops.mla_decode(**args)
    left = ops.mla_decode(**args | {"seq_lens": args["seq_lens"] * 0 + 496})
    right = ops.mla_decode(
        **args | {"seq_lens": args["seq_lens"] - 496, "block_table": args["block_table"][:, 31:]}
    )
    want = torch.logaddexp(left[1], right[1])
    merged = sum(part * torch.exp(part_lse - want)[..., None] for part, part_lse in (left, right))
    assert relative_error(lse, want) < 1e-6
    assert relative_error(o, merged) < 1e-5


@pytest.mark.parametrize("split", [1, 64, 100, 4096])
def test_mla_decode_does_not_depend_on_the_split(split, device):
    args = make(ZEBRA["8b"], [1500, 3], torch.float32, device, tokens=2)
    want = ops.mla_decode(**args)
    for a, b in zip(ops.mla_decode(**args, split_size=split), want, strict=True):
        assert relative_error(a, b) < 1e-5


def steep(kind):
    """A cache of one sequence of 300 tokens whose scores are adversarial: [300] added scores."""
    at = torch.arange(300.0)
    return {
        "rising": at * 21,
        "falling": -at * 21,
        "rising_by_block": (at // 64) * 21,
        "huge": torch.where(at % 7 == 0, 1e4, -1e4),
        "ties": torch.zeros(300),
        "one_key": torch.where(at == 299, 1e4, 0.0),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["rising", "falling", "rising_by_block", "huge", "ties", "one_key"]
)
@pytest.mark.parametrize("split", [0, 32])
def test_mla_decode_survives_adversarial_scores(kind, split, device):
    args = make((4, 1, 8, 2, 8, 16), [300], torch.float32, device, latent=True)
    pages = args["block_table"][0, :19].long()
    rows = torch.randn(19 * 16, 18, device=device)
    rows[:300, 16] = steep(kind).to(device)
    args["cache"][pages] = rows.view(19, 16, 18)
    args["q"][..., 16:] = torch.tensor([1.0, 0.0], device=device)
    args["q"][..., :16] = 0
    args["scale"] = 1.0
    got = check(args)
    split_got = ops.mla_decode(**args, split_size=split)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(split_got, got, strict=True))


def test_mla_decode_of_repeated_tokens_equals_one_token(device):
    args = make(ZEBRA["1b"], [200], torch.float32, device)
    args["cache"][:] = args["cache"][args["block_table"][0, 0].long(), 0]
    o, lse = ops.mla_decode(**args)
    one, one_lse = ops.mla_decode(**args | {"seq_lens": args["seq_lens"] * 0 + 1})
    assert relative_error(o, one) < 1e-5
    assert relative_error(lse, one_lse + torch.tensor(200.0).log().item()) < 1e-6


def test_mla_decode_grouped_weight_equals_the_weight_repeated(device):
    args = make(ZEBRA["3b"], [77, 5], torch.float32, device, tokens=2)
    want = ops.mla_decode(**args)
    per_head = args["kv_b_weight"].unflatten(0, (8, -1)).repeat_interleave(3, dim=0).flatten(0, 1)
    got = ops.mla_decode(**args | {"kv_b_weight": per_head, "num_kv_heads": 24})
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_mla_decode_depends_on_relative_positions_only():
    dims = (4, 2, 8, 16, 8, 24)
    angles = torch.arange(500.0)[:, None] * 10000.0 ** (-torch.arange(8.0) / 8)
    args = wide(make(dims, [50], torch.float64, "cpu", tokens=3, page=64))
    latent, q = args["cache"][args["block_table"][0, 0].long()], args["q"]
    outputs = []
    for shift in (0, 321):
        at = angles[shift : shift + 50].double()
        rotated_q, cache = q.clone(), args["cache"].clone()
        cos, sin = at.cos(), at.sin()
        cache[args["block_table"][0, 0].long(), :50, 24:] = reference.rotate(
            latent[:50, 24:], cos, sin
        )
        rotated_q[..., 8:] = reference.rotate(q[..., 8:], cos[47:, None], sin[47:, None])
        outputs.append(ops.mla_decode(**args | {"q": rotated_q, "cache": cache}))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*outputs, strict=True))


def test_mla_decode_result_does_not_depend_on_the_rest_of_the_batch():
    args = make(ZEBRA["8b"], [700, 3, 0, 65, 1000], torch.bfloat16, "cpu", tokens=2)
    want = ops.mla_decode(**args)
    order = torch.tensor([3, 0, 4, 1, 2])
    rows = {k: args[k][order] for k in ("q", "block_table", "seq_lens")}
    for a, b in zip(ops.mla_decode(**args | rows), want, strict=True):
        assert torch.equal(a, b[order])
    one = {k: args[k][:1] for k in ("q", "block_table", "seq_lens")}
    for a, b in zip(ops.mla_decode(**args | one), want, strict=True):
        assert torch.equal(a, b[:1])


def test_mla_decode_is_deterministic(device):
    args = make(ZEBRA["8b"], [700, 3, 0, 65], torch.bfloat16, device, tokens=2)
    first = ops.mla_decode(**args)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(ops.mla_decode(**args), first, strict=True))


def test_mla_decode_does_not_depend_on_threads():
    args = make(ZEBRA["8b"], [1100, 3, 0, 65], torch.bfloat16, "cpu", tokens=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.mla_decode(**args))
    finally:
        torch.set_num_threads(before)
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def test_mla_decode_keeps_nan_in_its_sequence(device):
    args = make(ZEBRA["1b"], [50, 60, 70], torch.float32, device)
    want = ops.mla_decode(**args)
    args["cache"][args["block_table"][1, 2].long(), 3, 4] = float("nan")
    o, lse = ops.mla_decode(**args)
    assert o[1].isnan().any() and lse[1].isnan().all()
    assert torch.equal(o[[0, 2]], want[0][[0, 2]]) and torch.equal(lse[[0, 2]], want[1][[0, 2]])


def test_mla_decode_leaves_its_inputs_alone(device):
    args = make(ZEBRA["1b"], [50, 0], torch.bfloat16, device)
    before = {k: v.clone() for k, v in args.items() if torch.is_tensor(v)}
    ops.mla_decode(**args)
    for k, v in before.items():
        assert torch.equal(v.nan_to_num(7.0), args[k].nan_to_num(7.0)), k


@pytest.mark.parametrize("latent", [False, True])
def test_mla_decode_passes_opcheck(latent, device):
    args = make(ODD["three_heads"], [5, 20], torch.float32, device, latent=latent)
    args["cache"] = args["cache"].nan_to_num(0.5)
    torch.library.opcheck(torch.ops.zebra.mla_decode.default, (), args)


def test_mla_decode_compiles_fullgraph(device):
    args = make(ODD["three_heads"], [5, 20], torch.float32, device)
    compiled = torch.compile(ops.mla_decode, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(**args), ops.mla_decode(**args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_mla_decode_survives_graph_replay_with_other_lengths():
    args = make(ZEBRA["8b"], [200, 130], torch.bfloat16, "cuda", page=64, spare=0)
    args["cache"] = torch.randn_like(args["cache"])
    args["block_table"] = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]], device="cuda").int()
    ops.mla_decode(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.mla_decode(**args)
    for lengths in ([256, 0], [1, 77]):
        args["seq_lens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, ops.mla_decode(**args), strict=True))


COMPARE = """
import sys, torch
sys.path[:0] = ["tests", "tests/ops"]
import test_mla_attention, test_mla_decode
for dtype in (torch.bfloat16, torch.float32):
    torch.manual_seed(0)
    test_mla_decode.check(
        test_mla_decode.make(test_mla_decode.ZEBRA["8b"], [700, 3, 0, 65], dtype, "cpu", tokens=3))
    attention = test_mla_attention.make(test_mla_attention.DIMS["3b"], 2, 70, dtype, "cpu")
    test_mla_attention.check(*attention)
"""


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_mla_kernels_match_reference_on_lesser_instruction_sets(isa):
    environment = os.environ | {"ZEBRA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", COMPARE], env=environment, cwd=root, check=True)


def change(**new):
    return lambda args: args | {k: v(args) for k, v in new.items()}


REJECTED = {
    "q_rank": (change(q=lambda a: a["q"][0]), r"q must be \[B, T, H, Dn \+ E\] with T, H >= 1"),
    "q_dtype": (change(q=lambda a: a["q"].int()), "q must be float32, bfloat16 or float16"),
    "q_strides": (
        change(q=lambda a: a["q"].transpose(2, 3).contiguous().transpose(2, 3)),
        "q must be contiguous in its last dimension",
    ),
    "cache_dtype": (change(cache=lambda a: a["cache"].half()), "cache must be float32 like q"),
    "cache_rank": (change(cache=lambda a: a["cache"][0]), r"cache must be \[pages, page, R \+ E\]"),
    "weight_rows": (
        change(kv_b_weight=lambda a: a["kv_b_weight"][:-1]),
        r"kv_b_weight must be \[G \* \(Dn \+ Dv\), R\] with G = 3, Dn = 16 and Dv >= 1",
    ),
    "heads": (
        change(num_kv_heads=lambda a: 2),
        "num_kv_heads must be given .* divide H = 3, got 2",
    ),
    "no_rank": (
        change(kv_b_weight=lambda a: None),
        r"kv_lora_rank must be 1 to R \+ E = 80 where kv_b_weight is not given, got 0",
    ),
    "two_ranks": (change(kv_lora_rank=lambda a: 47), "kv_lora_rank must be 0 or R = 48"),
    "table_dtype": (
        change(block_table=lambda a: a["block_table"].long()),
        r"block_table must be int32, got \[2, 3\] int64",
    ),
    "table_rows": (
        change(block_table=lambda a: a["block_table"][:1]),
        r"block_table must be \[B, max_pages\] = \[2, any\]",
    ),
    "lengths_shape": (
        change(seq_lens=lambda a: a["seq_lens"][:1]),
        r"seq_lens must be \[B\] = \[2\], got \[1\]",
    ),
    "split": (change(split_size=lambda a: -1), r"split_size must be 0 \(automatic\) or a number"),
}
REJECTED_ON_CPU = {
    "long_sequence": (
        change(seq_lens=lambda a: a["seq_lens"] * 0 + 49),
        r"seq_lens must be 0 to max_pages \* page = 48, got 49 at 0",
    ),
    "negative_sequence": (
        change(seq_lens=lambda a: a["seq_lens"] - 6),
        r"seq_lens must be 0 to max_pages \* page = 48, got -1 at 0",
    ),
    "unmapped_page": (
        change(seq_lens=lambda a: a["seq_lens"] + 20),
        r"block_table must be 0 to pages - 1 = 4 in the entries that a sequence uses, "
        r"got 2147480000 at \[0, 1\] with a sequence of 25",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_mla_decode_rejects(case, device):
    broken, message = REJECTED[case]
    args = broken(make(ODD["three_heads"], [5, 20], torch.float32, device))
    message = "zebra::mla_decode: " + message
    assert_rejected(message, ops.mla_decode, _mla_decode_composite, **args)


@pytest.mark.parametrize("case", REJECTED_ON_CPU)
def test_mla_decode_rejects_values_out_of_range_on_the_cpu(case):
    broken, message = REJECTED_ON_CPU[case]
    args = make(ODD["three_heads"], [5, 20], torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="zebra::mla_decode: " + message):
        ops.mla_decode(**broken(args))
