"""The 16-bit CUDA kernels of ssd_scan: each against the truth, and what only they refuse.

test_ssd_scan.py runs on CUDA too, with the kernel that a GPU takes by default and the composite.
"""

import hashlib
from itertools import pairwise

import pytest
import torch
from ssd_cases import check, doubles, make

from zebra import _extension, ops
from zebra.ops import reference
from zebra.testing import relative_error

HALF = [torch.bfloat16, torch.float16]
TIME = ("x", "dt", "B", "C", "z")
OPTIONAL = ["D", "z", "dt_bias", "norm_weight", "initial_state"]


@pytest.fixture(params=["default", "portable"])
def kernel(request, monkeypatch):
    """The kernel that this GPU takes by itself, and the portable one."""
    monkeypatch.setenv("ZEBRA_PORTABLE", "1" if request.param == "portable" else "0")


gpu = pytest.mark.gpu
on_both = pytest.mark.usefixtures("kernel")


def cuda(batch=1, tokens=70, H=4, P=64, N=64, groups=(2, 2, 4), dtype=torch.bfloat16, **options):
    return make(batch, tokens, H, P, N, groups, dtype, "cuda", **options)


@gpu
@on_both
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("P", "N"), [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize(
    ("H", "groups"), [(6, (2, 2, 6)), (4, (1, 1, 4)), (4, (4, 1, 1)), (6, (1, 2, 3))], ids=str
)
def test_ssd_scan_kernel_matches_reference(H, groups, P, N, dtype):
    check(cuda(2, 150, H, P, N, groups, dtype))


@gpu
@on_both
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 2047])
@pytest.mark.parametrize(("P", "N"), [(64, 64), (128, 128)])
def test_ssd_scan_kernel_matches_reference_at_any_length(tokens, P, N):
    check(cuda(1, tokens, 2, P, N, (1, 1, 2)))


@gpu
@on_both
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("absent", [*OPTIONAL, "all"])
def test_ssd_scan_kernel_takes_every_optional_argument_or_not(absent, dtype):
    without = OPTIONAL if absent == "all" else [absent]
    check(cuda(2, 70, dtype=dtype, without=without, small=dtype))


@gpu
@on_both
@pytest.mark.parametrize("dt_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ssd_scan_kernel_takes_dt_as_the_step_without_softplus(dt_dtype):
    args = cuda(without=["dt_bias"])
    args["dt"] = (args["dt"].abs() * 0.1).to(dt_dtype)
    check(args, dt_softplus=False)


@gpu
@on_both
@pytest.mark.parametrize(("P", "N"), [(64, 128), (128, 128)])
def test_ssd_scan_kernel_matches_reference_on_many_random_lengths(P, N):
    lengths = torch.randint(0, 48, (100,)).tolist()
    for empty in (0, 40, 99):
        lengths[empty] = 0
    cu = torch.tensor([0, *lengths]).cumsum(0).tolist()
    check(cuda(1, cu[-1], 3, P, N, (1, 1, 3), cu=cu))


@gpu
@on_both
@pytest.mark.parametrize("without", [[], ["initial_state"]])
def test_ssd_scan_kernel_of_packed_sequences_equals_separate_ones(without):
    cu = [0, 0, 3, 64, 64, 65, 130, 195, 200, 200]
    args = cuda(1, 200, 6, 64, 128, (2, 2, 6), cu=cu, without=without)
    y, state = ops.ssd_scan(**args)
    for i, (first, end) in enumerate(pairwise(cu)):
        one = dict(args, cu_seqlens=None, **{k: args[k][:, first:end] for k in TIME})
        if not without:
            one["initial_state"] = args["initial_state"][i : i + 1]
        want_y, want_state = ops.ssd_scan(**one)
        assert torch.equal(y[:, first:end], want_y) and torch.equal(state[i], want_state[0])


@gpu
@on_both
def test_ssd_scan_kernel_is_batch_invariant_on_request(monkeypatch):
    """5000 tokens, cut every 2048, alone and between others: the same bits."""
    monkeypatch.setenv("ZEBRA_BATCH_INVARIANT", "1")
    cu = [0, 700, 5700, 5700, 9000]
    args = cuda(1, cu[-1], 4, 128, 128, (1, 1, 4), cu=cu)
    y, state = ops.ssd_scan(**args)
    one = dict(args, cu_seqlens=None, **{k: args[k][:, 700:5700] for k in TIME})
    one["initial_state"] = args["initial_state"][1:2]
    want_y, want_state = ops.ssd_scan(**one)
    assert torch.equal(y[:, 700:5700], want_y) and torch.equal(state[1], want_state[0])


@gpu
@on_both
def test_ssd_scan_kernel_of_no_tokens_passes_the_states_through():
    for cu in (None, [0], [0, 0, 0]):
        args = cuda(1, 0, cu=cu)
        y, state = ops.ssd_scan(**args)
        assert y.numel() == 0 and torch.equal(state, args["initial_state"])
        assert ops.ssd_scan(**{**args, "initial_state": None})[1].eq(0).all()


@gpu
@on_both
def test_ssd_scan_kernel_of_two_parts_stays_near_the_whole():
    args = cuda(1, 150, 4, 128, 128)
    y, state = ops.ssd_scan(**args)
    first = {k: v[:, :77] if k in TIME else v for k, v in args.items()}
    second = {k: v[:, 77:] if k in TIME else v for k, v in args.items()}
    y1, middle = ops.ssd_scan(**first)
    y2, last = ops.ssd_scan(**{**second, "initial_state": middle})
    assert relative_error(torch.cat((y1, y2), 1), y) < 5e-3
    assert relative_error(last, state) < 3e-3


@gpu
@on_both
def test_ssd_scan_kernel_reads_wide_rows_and_unaligned_states_in_place():
    H, G, P, N = 6, 2, 64, 128
    sizes = [H * P, G * P, G * N, H * N, H]
    row = torch.randn(2, 90, 8 + sum(sizes) + 10, dtype=torch.bfloat16, device="cuda")
    z, x, B, C, dt = row[..., 8:-10].split(sizes, dim=-1)
    args = cuda(2, 90, H, P, N, (G, G, H))
    shapes = dict(z=(z, H, P), x=(x, G, P), B=(B, G, N), C=(C, H, N))
    args.update({k: t.unflatten(-1, (h, d)) for k, (t, h, d) in shapes.items()}, dt=dt)
    want = ops.ssd_scan(**{k: v if k == "cu_seqlens" else v.contiguous() for k, v in args.items()})
    flat = torch.empty(args["initial_state"].numel() + 1, device="cuda")  # 4 bytes off
    flat[1:] = args["initial_state"].flatten()
    args["initial_state"] = flat[1:].view_as(args["initial_state"])
    for got, w in zip(ops.ssd_scan(**args), want, strict=True):
        assert torch.equal(got, w)
    heads_first = {k: args[k].transpose(1, 2).contiguous().transpose(1, 2) for k in shapes}
    assert torch.equal(ops.ssd_scan(**{**args, **heads_first})[0], want[0])


@gpu
@on_both
def test_ssd_scan_kernel_reads_beyond_two_to_the_31_elements():
    args = cuda(1, 40, 2, 64, 64, (1, 1, 2))
    want = ops.ssd_scan(**args)
    stride = 1 << 26
    store = torch.empty(40 * stride, dtype=torch.bfloat16, device="cuda")
    at = 0
    for k in ("x", "B", "C", "z"):
        small = args[k]
        size = (40 * stride, stride, small.size(3), 1)
        args[k] = store[at:].as_strided(small.shape, size, store[at:].storage_offset())
        args[k].copy_(small)
        at += small[0, 0].numel()
    for got, w in zip(ops.ssd_scan(**args), want, strict=True):
        assert torch.equal(got, w)


@gpu
@on_both
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("A", [-0.0, -1e-6, -1e3, -1e4])
def test_ssd_scan_kernel_matches_reference_at_extreme_decay(A, dtype):
    args = cuda(tokens=130, dtype=dtype)
    args["A"] = torch.full_like(args["A"], A)
    check(args)


@gpu
@on_both
@pytest.mark.parametrize("dt", ["huge", "1000", "tiny", "alternating", "one huge"])
def test_ssd_scan_kernel_matches_reference_at_extreme_steps(dt):
    args = cuda(tokens=130, without=["z", "norm_weight", "dt_bias"])
    t = torch.arange(130, device="cuda")[:, None]
    args["dt"] = args["dt"].float() + {
        "huge": torch.tensor(20.0),
        "1000": torch.tensor(1e3),
        "tiny": torch.tensor(-30.0),
        "alternating": torch.where(t % 2 == 0, 1e3, -8.0),
        "one huge": torch.where(t == 70, 1e4, -6.0),
    }[dt].to("cuda")
    check(args)


@gpu
@on_both
@pytest.mark.parametrize(("P", "N"), [(64, 64), (128, 128), (64, 128)])
@pytest.mark.parametrize("without", [[], ["z", "norm_weight"]], ids=["gated", "plain"])
def test_ssd_scan_kernel_mean_error_stays_near_the_output_rounding(P, N, without):
    """0.141 % is the rounding of y itself (mean |error| / mean |y|)."""
    args = cuda(1, 1024, 4, P, N, (1, 1, 4), without=[*without, "initial_state"])
    y, state = ops.ssd_scan(**args)
    truth, truth_state = reference.ssd_scan(**doubles(args))
    assert (y.double().cpu() - truth).abs().mean() <= 0.0025 * truth.abs().mean()
    assert relative_error(state, truth_state) <= 3e-3


@gpu
@on_both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [*TIME, "initial_state"])
def test_ssd_scan_kernel_keeps_nan_in_its_sequence(where, value):
    args = cuda(1, 170, cu=[0, 70, 90, 93, 170])
    clean_y, clean_state = ops.ssd_scan(**args)
    args[where] = args[where].clone()
    if where == "initial_state":
        args[where][2] = value
    else:
        args[where][0, 91] = value
    y, state = ops.ssd_scan(**args)
    others = torch.ones(170, dtype=torch.bool, device="cuda")
    others[90:93] = False
    assert torch.equal(y[:, others], clean_y[:, others])
    assert torch.equal(state[[0, 1, 3]], clean_state[[0, 1, 3]])
    assert not y[:, 91].isfinite().all() or where == "z"


@gpu
@on_both
@pytest.mark.parametrize("where", TIME)
@pytest.mark.parametrize("at", [0, 5, 63, 64, 77, 140])
def test_ssd_scan_kernel_lets_nan_reach_its_chunk_of_64_and_later_tokens_only(where, at):
    args = cuda(1, 150)
    clean_y, _ = ops.ssd_scan(**args)
    args[where][0, at] = float("nan")
    y, state = ops.ssd_scan(**args)
    chunk = at // 64 * 64
    assert torch.equal(y[:, :chunk], clean_y[:, :chunk]) and y[:, at].isnan().all()
    spreads = where in ("x", "dt", "B")
    assert y[:, at + 1 :].isnan().all() if spreads else y[:, at + 1 :].isfinite().all()
    assert state.isnan().all() if spreads else state.isfinite().all()


@gpu
@on_both
@pytest.mark.parametrize(("P", "N"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_ssd_scan_kernel_is_deterministic(P, N):
    args = cuda(4, 300, 32, P, N, (8, 8, 32))

    def digest():
        y, state = ops.ssd_scan(**args)
        return hashlib.sha256(y.float().cpu().numpy().tobytes() + state.cpu().numpy().tobytes())

    assert len({digest().hexdigest() for _ in range(5)}) == 1


@gpu
@on_both
@pytest.mark.parametrize("P", [64, 128])
def test_ssd_scan_kernel_survives_graph_replay_with_other_inputs(P):
    cu = [0, 0, 3, 64, 64, 65, 130, 195, 200, 200]
    args = cuda(1, 200, 4, P, 128, cu=cu)
    ops.ssd_scan(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, state = ops.ssd_scan(**args)
    for k in TIME:
        args[k].normal_()
    args["cu_seqlens"].copy_(torch.tensor([0, 7, 7, 80, 81, 99, 150, 150, 151, 200]))
    graph.replay()
    want_y, want_state = ops.ssd_scan(**args)
    assert torch.equal(y, want_y) and torch.equal(state, want_state)


# Refusals.


@gpu
@on_both
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["x", "B"])
def test_ssd_scan_kernel_rejects_other_sizes_naming_what_it_takes(name, dtype):
    args = cuda(dtype=dtype, without=OPTIONAL)
    names = ["x"] if name == "x" else ["B", "C"]
    args.update({k: args[k][..., :32].contiguous() for k in names})
    legend, size = (r"\[B, T, Gx, P\]", "P") if name == "x" else (r"\[B, T, Gb, N\]", "N")
    message = f"{name} must be {legend} with {size} = 64 or 128 .*, got .*32"
    with pytest.raises(RuntimeError, match="zebra::ssd_scan: " + message):
        ops.ssd_scan(**args)


@gpu
@on_both
@pytest.mark.parametrize("name", ["x", "B", "C", "z"])
@pytest.mark.parametrize("how", ["address", "row", "head"])
def test_ssd_scan_kernel_rejects_misaligned_rows(name, how):
    args = cuda(1, 70, 4, 64, 64, (2, 2, 4))
    B, T, heads, dim = args[name].shape
    pad = {"address": (0, 8, 1), "row": (0, 4, 0), "head": (4, 0, 0)}[how]  # head, row, offset
    store = torch.zeros(B, T, heads * (dim + pad[0]) + pad[1], dtype=torch.bfloat16, device="cuda")
    wide = store[..., pad[2] : pad[2] + heads * (dim + pad[0])]
    args[name] = wide.unflatten(-1, (heads, dim + pad[0]))[..., :dim]
    message = (
        f"zebra::ssd_scan: {name} must be 16-byte aligned with strides that are multiples of 8"
    )
    with pytest.raises(RuntimeError, match=message + r", got \[1, 70, "):
        ops.ssd_scan(**args)


@gpu
def test_ssd_scan_serves_float32_of_any_size_through_the_composite(device="cuda"):
    assert ops.support_matrix()["ssd_scan"]["cuda"].endswith("composite (float32)")
    check(make(2, 70, 6, 5, 7, (1, 2, 3), device=device))


# The tile, without a GPU.


@pytest.mark.skipif(_extension.bindings() is None, reason="zebra._C was not built")
def test_ssd_scan_tiles_fit_every_gpu():
    from zebra import _C

    for P, N in ((64, 64), (64, 128), (128, 64), (128, 128)):
        c = _C.select_config("ssd_scan", sequences=8, heads=32, head_dim=P, state_dim=N)
        assert c["threads"] == 2 * P and c["ctas"] == 256  # a warp for 16 rows of P
        assert c["threads"] * c["ctas_per_sm"] * 128 <= 65536  # registers
        assert c["smem_bytes"] <= 99 * 1024  # sm_89 and sm_120
        assert 2 * (c["smem_bytes"] + 1024) <= 164 * 1024  # two on an A100
    with pytest.raises(ValueError, match="head_dim and state_dim 64 and 128"):
        _C.select_config("ssd_scan", sequences=8, heads=32, head_dim=80, state_dim=64)
