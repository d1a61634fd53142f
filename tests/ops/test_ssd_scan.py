"""ssd_scan, forward: against its fp64 truth, its invariances, hard inputs and refusals."""

import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_rejected
from ssd_cases import DTYPES, check, doubles, make

from zebra import ops
from zebra.ops import reference
from zebra.ops.ssd import _chunked_scan, _ssd_scan_composite
from zebra.testing import relative_error

PACKED = [0, 0, 3, 64, 64, 65, 130, 195, 200, 200]  # empty ones first, inside and last
OPTIONAL = ["D", "z", "dt_bias", "norm_weight", "initial_state"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "H", "P", "N", "groups"),
    [
        (2, 70, 4, 8, 16, (2, 2, 4)),  # Zebra: x and B at KV-head width
        (1, 130, 6, 32, 64, (2, 2, 6)),  # three query heads a KV head
        (1, 65, 8, 64, 32, (8, 1, 1)),  # Mamba-2: B and C shared by all heads
        (2, 33, 6, 5, 7, (1, 2, 3)),  # three different ratios, odd sizes
        (1, 128, 2, 80, 48, (1, 2, 1)),
    ],
)
def test_ssd_scan_matches_reference(batch, tokens, H, P, N, groups, dtype, device):
    check(make(batch, tokens, H, P, N, groups, dtype, device))


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ssd_scan_matches_reference_at_chunk_edges(tokens, dtype, device):
    if tokens > 0:
        check(make(tokens=tokens, dtype=dtype, device=device))
        return
    args = make(tokens=0, dtype=dtype, device=device)
    y, state = ops.ssd_scan(**args)
    assert y.shape == args["z"].shape and torch.equal(state, args["initial_state"])
    args["initial_state"] = None
    assert ops.ssd_scan(**args)[1].eq(0).all()


@pytest.mark.parametrize("absent", [*OPTIONAL, "all"])
def test_ssd_scan_takes_every_optional_argument_or_not(absent, device):
    check(make(device=device, without=OPTIONAL if absent == "all" else [absent]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ssd_scan_takes_dt_as_the_step_without_softplus(dtype, device):
    args = make(dtype=dtype, device=device, without=["dt_bias"])
    args["dt"] = args["dt"].abs() * 0.1
    check(args, dt_softplus=False)


@pytest.mark.parametrize("dt_dtype", ["like x", "float32"])
@pytest.mark.parametrize("small", ["like x", "float32"])
def test_ssd_scan_takes_float32_steps_and_vectors(dt_dtype, small, device):
    small = torch.float32 if small == "float32" else torch.bfloat16
    args = make(dtype=torch.bfloat16, small=small, device=device)
    if dt_dtype == "float32":
        args["dt"] = args["dt"].float()
    check(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ssd_scan_matches_reference_on_packed_sequences(dtype, device):
    check(make(1, 200, 6, 16, 8, (2, 2, 6), dtype, device, cu=PACKED))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ssd_scan_matches_reference_at_any_shape(data):
    size = st.integers(1, 20)
    heads = data.draw(st.sampled_from([1, 2, 3, 6]))
    divisors = st.sampled_from([g for g in (1, 2, 3, 6) if heads % g == 0])
    groups = tuple(data.draw(divisors) for _ in range(3))
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=4))
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    P, N = data.draw(size), data.draw(size)
    if data.draw(st.booleans()) and cu[-1] > 0:
        check(make(1, cu[-1], heads, P, N, groups, cu=cu))
    else:
        check(make(2, max(lengths[0], 1), heads, P, N, groups))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ssd_scan_bfloat16_mean_error_stays_near_the_output_rounding(head_dim, device):
    """0.141 % is the rounding of y itself (mean |error| / mean |y|)."""
    args = make(1, 320, 4, head_dim, head_dim, (1, 1, 4), torch.bfloat16, device)
    for without in ([], ["z", "norm_weight"]):
        case = {k: None if k in without else v for k, v in args.items()}
        y, state = ops.ssd_scan(**case)
        truth, truth_state = reference.ssd_scan(**doubles(case))
        assert (y.double().cpu() - truth).abs().mean() <= 0.0025 * truth.abs().mean()
        assert relative_error(state, truth_state) <= 3e-3


# Invariances.


@pytest.mark.parametrize("cut", [1, 37, 64, 129])
def test_ssd_scan_of_two_parts_equals_the_whole(cut, device):
    args = make(tokens=150, device=device)
    y, state = ops.ssd_scan(**args)
    time = ("x", "dt", "B", "C", "z")
    first = {k: v[:, :cut] if k in time else v for k, v in args.items()}
    second = {k: v[:, cut:] if k in time else v for k, v in args.items()}
    y1, middle = ops.ssd_scan(**first)
    y2, last = ops.ssd_scan(**{**second, "initial_state": middle})
    torch.testing.assert_close(torch.cat((y1, y2), 1), y, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("without", [[], ["initial_state"]])
def test_ssd_scan_of_packed_sequences_equals_separate_ones(without, device):
    args = make(1, 200, 6, 16, 8, (2, 2, 6), device=device, cu=PACKED, without=without)
    y, state = ops.ssd_scan(**args)
    for i, (first, end) in enumerate(pairwise(PACKED)):
        one = dict(args, cu_seqlens=None)
        for k in ("x", "dt", "B", "C", "z"):
            one[k] = one[k][:, first:end]
        if one["initial_state"] is not None:
            one["initial_state"] = one["initial_state"][i : i + 1]
        want_y, want_state = ops.ssd_scan(**one)
        if device == "cpu":
            assert torch.equal(y[:, first:end], want_y) and torch.equal(state[i], want_state[0])
        else:
            torch.testing.assert_close(y[:, first:end], want_y)
            torch.testing.assert_close(state[i], want_state[0])


def test_ssd_scan_does_not_depend_on_the_order_of_packed_sequences():
    lengths, order = [5, 70, 1, 64], [2, 0, 3, 1]
    cu = torch.tensor([0, *lengths]).cumsum(0).tolist()
    args = make(1, 140, cu=cu)
    rows = [torch.arange(cu[i], cu[i + 1]) for i in range(4)]
    moved = dict(args, initial_state=args["initial_state"][order])
    for k in ("x", "dt", "B", "C", "z"):
        moved[k] = args[k][:, torch.cat([rows[i] for i in order])]
    moved_cu = torch.tensor([0, *(lengths[i] for i in order)], dtype=torch.int32).cumsum(0)
    y, state = ops.ssd_scan(**args)
    got_y, got_state = ops.ssd_scan(**dict(moved, cu_seqlens=moved_cu.int()))
    assert torch.equal(got_state, state[order])
    assert torch.equal(got_y, y[:, torch.cat([rows[i] for i in order])])


def test_ssd_scan_of_shared_heads_equals_expanded_ones(device):
    args = make(1, 90, 6, 16, 8, (2, 3, 1), device=device)
    expanded = dict(args)
    for k in ("x", "B", "C"):
        expanded[k] = args[k].repeat_interleave(6 // args[k].size(2), dim=2)
    for got, want in zip(ops.ssd_scan(**args), ops.ssd_scan(**expanded), strict=True):
        assert torch.equal(got, want) if device == "cpu" else torch.allclose(got, want)


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_ssd_scan_reads_views_of_one_projection_in_place(offset, device):
    H, G, P, N = (6, 2, 64, 64) if device == "cuda" else (6, 2, 16, 8)
    sizes = [H * P, G * P, G * N, H * N, H]
    tail = 3 if offset == 1 else -sum(sizes) % 8 + 8
    row = torch.randn(2, 70, offset + sum(sizes) + tail, dtype=torch.bfloat16, device=device)
    z, x, B, C, dt = row[..., offset:-tail].split(sizes, dim=-1)
    args = make(2, 70, H, P, N, (G, G, H), torch.bfloat16, device)
    shapes = dict(z=(z, H, P), x=(x, G, P), B=(B, G, N), C=(C, H, N))
    views = {k: t.unflatten(-1, (h, d)) for k, (t, h, d) in shapes.items()}
    args.update(views, dt=dt)
    if device == "cuda" and offset == 1:
        with pytest.raises(RuntimeError, match="zebra::ssd_scan: x must be 16-byte aligned"):
            ops.ssd_scan(**args)
        return
    y, state = ops.ssd_scan(**args)
    copies = {k: t.contiguous() for k, t in {**views, "dt": dt}.items()}
    want_y, want_state = ops.ssd_scan(**{**args, **copies})
    assert torch.equal(y, want_y) and torch.equal(state, want_state)
    swapped = {k: t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in copies.items()}
    y, _ = ops.ssd_scan(**{**args, **swapped, "dt": dt})
    assert torch.equal(y, want_y)


@pytest.mark.parametrize("chunk", [16, 32, 128])
@pytest.mark.parametrize("cu", [None, PACKED])
def test_ssd_scan_composite_does_not_depend_on_its_chunk(chunk, cu):
    args = doubles(make(1 if cu else 2, 200, cu=cu))
    want = reference.ssd_scan(**args)
    got = _chunked_scan(**args, dt_softplus=True, norm_eps=1e-5, chunk=chunk)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


# Hard inputs.


@pytest.mark.parametrize("A", [-0.0, -1e-6, -1e3, -1e4])
def test_ssd_scan_matches_reference_at_extreme_decay(A, device):
    args = make(tokens=130, device=device)
    args["A"] = torch.full_like(args["A"], A)
    check(args)


@pytest.mark.parametrize("dt", ["huge", "1000", "tiny", "alternating", "one huge"])
def test_ssd_scan_matches_reference_at_extreme_steps(dt, device):
    args = make(tokens=130, device=device, without=["z", "norm_weight", "dt_bias"])
    t = torch.arange(130, device=device)[:, None]
    args["dt"] = args["dt"] + {
        "huge": torch.tensor(20.0),
        "1000": torch.tensor(1e3),
        "tiny": torch.tensor(-30.0),
        "alternating": torch.where(t % 2 == 0, 1e3, -8.0),
        "one huge": torch.where(t == 70, 1e4, -6.0),
    }[dt].to(device)
    check(args)


def test_ssd_scan_ignores_prepended_padding_with_no_step(device):
    args = make(1, 70, device=device)
    y, state = ops.ssd_scan(**args)
    for pad, step in ((5, -1e4), (64, float("-inf"))):
        padded = dict(args)
        for k in ("x", "dt", "B", "C", "z"):
            fill = torch.randn_like(args[k])[:, :1].expand(-1, pad, *args[k].shape[2:])
            fill = torch.full_like(fill, step) if k == "dt" else fill
            padded[k] = torch.cat((fill, args[k]), 1)
        got_y, got_state = ops.ssd_scan(**padded)
        torch.testing.assert_close(got_y[:, pad:], y, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(got_state, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "dt", "B", "C", "z", "initial_state"])
def test_ssd_scan_keeps_nan_in_its_sequence(where, value, device):
    cu = [0, 70, 90, 93, 170]
    args = make(1, 170, device=device, cu=cu)
    clean_y, clean_state = ops.ssd_scan(**args)
    args[where] = args[where].clone()
    if where == "initial_state":
        args[where][2] = value
    else:
        args[where][0, 91] = value
    y, state = ops.ssd_scan(**args)
    others = torch.ones(170, dtype=torch.bool, device=device)
    others[90:93] = False
    assert torch.equal(y[:, others], clean_y[:, others])
    assert torch.equal(state[[0, 1, 3]], clean_state[[0, 1, 3]])
    assert not y[:, 91].isfinite().all() or where == "z"


@pytest.mark.parametrize("where", ["x", "dt", "B", "C", "z"])
@pytest.mark.parametrize("at", [0, 5, 63, 64, 77])
def test_ssd_scan_lets_nan_reach_later_tokens_only(where, at):
    args = make(1, 130)
    clean_y, _ = ops.ssd_scan(**args)
    args[where][0, at] = float("nan")
    y, state = ops.ssd_scan(**args)
    assert torch.equal(y[:, :at], clean_y[:, :at]) and y[:, at].isnan().all()
    spreads = where in ("x", "dt", "B")
    assert y[:, at + 1 :].isnan().all() if spreads else y[:, at + 1 :].isfinite().all()
    assert state.isnan().all() if spreads else state.isfinite().all()


def test_ssd_scan_is_deterministic(device):
    args = make(2, 200, 8, 64, 64, (2, 2, 8), torch.bfloat16, device)

    def digest():
        y, state = ops.ssd_scan(**args)
        return hashlib.sha256(y.float().cpu().numpy().tobytes() + state.cpu().numpy().tobytes())

    assert len({digest().hexdigest() for _ in range(5)}) == 1


def test_ssd_scan_does_not_depend_on_the_number_of_threads():
    args = make(1, 200, 8, 32, 16, (2, 2, 8), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.ssd_scan(**args))
    torch.set_num_threads(before)
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(state, results[0][1])


@pytest.mark.gpu
def test_ssd_scan_survives_graph_replay_with_other_lengths():
    args = make(1, 200, dtype=torch.bfloat16, device="cuda", cu=PACKED)
    ops.ssd_scan(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, state = ops.ssd_scan(**args)
    args["x"].normal_()
    args["cu_seqlens"].copy_(torch.tensor([0, 7, 7, 80, 81, 99, 150, 150, 151, 200]))
    graph.replay()
    want_y, want_state = ops.ssd_scan(**args)
    assert torch.equal(y, want_y) and torch.equal(state, want_state)


# Refusals: argument -> (its replacement, the message).

REJECTED = {
    "x_dims": ("x", lambda t: t[0], r"x must be \[B, T, Gx, P\] = \[any, any, any, any\], got"),
    "x_integers": ("x", lambda t: t.int(), "x must be float32, bfloat16 or float16"),
    "x_groups": (
        "x",
        lambda t: t[:, :, :1].expand(-1, -1, 3, -1),
        "x must be of a number of heads that divides H = 4, got",
    ),
    "x_last_dim": (
        "x",
        lambda t: t.mT.contiguous().mT,
        "x must be contiguous in its last dimension, got",
    ),
    "dt_shape": ("dt", lambda t: t[..., :3], r"dt must be \[B, T, H\] = \[2, 70, 4\], got \[2, 70"),
    "dt_dtype": ("dt", lambda t: t.half(), "dt must be float32 like x, or float32, got"),
    "A_dtype": ("A", lambda t: t.half(), "A must be float32, got"),
    "A_dims": ("A", lambda t: t[None], r"A must be \[H\] = \[any\], got"),
    "B_dtype": ("B", lambda t: t.half(), "B must be float32 like x, got"),
    "B_tokens": ("B", lambda t: t[:, :9], r"B must be \[B, T, Gb, N\] = \[2, 70, any, any\], got"),
    "C_state": ("C", lambda t: t[..., :5], r"C must be \[B, T, Gc, N\] = \[2, 70, 4, 8\], got"),
    "D_shape": ("D", lambda t: t[:2], r"D must be \[H\] = \[4\], got"),
    "D_dtype": ("D", lambda t: t.half(), "D must be float32 like x, or float32, got"),
    "z_shape": ("z", lambda t: t[:, :, :2], r"z must be \[B, T, H, P\] = \[2, 70, 4, 8\], got"),
    "z_absent": ("z", lambda t: None, "z must be given with norm_weight"),
    "dt_bias_shape": ("dt_bias", lambda t: t[:2], r"dt_bias must be \[H\] = \[4\], got"),
    "norm_weight_shape": (
        "norm_weight",
        lambda t: t[:8],
        r"norm_weight must be \[H \* P\] = \[32\], got",
    ),
    "state_shape": (
        "initial_state",
        lambda t: t.mT[:, :, :, :5],
        r"initial_state must be \[B, H, P, N\] = \[2, 4, 8, 8\], got",
    ),
    "state_dtype": ("initial_state", lambda t: t.half(), "initial_state must be float32, got"),
    "cu_dtype": (
        "cu_seqlens",
        lambda t: torch.tensor([0, 70]),
        "cu_seqlens must be int32, got",
    ),
    "cu_batch": (
        "cu_seqlens",
        lambda t: torch.tensor([0, 70], dtype=torch.int32),
        r"x must be \[1, T, Gx, P\] with cu_seqlens, got",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_ssd_scan_rejects(case, device):
    name, change, message = REJECTED[case]
    args = make(device=device)
    changed = change(args[name])
    args[name] = changed if changed is None else changed.to(device)
    assert_rejected("zebra::ssd_scan: " + message, ops.ssd_scan, _ssd_scan_composite, **args)


def test_ssd_scan_rejects_growth_naming_the_head():
    args = make()
    args["A"][2:] = 0.5
    message = r"zebra::ssd_scan: A must be <= 0 .* for every head, got A\[2\] = 0.5"
    with pytest.raises(RuntimeError, match=message):
        ops.ssd_scan(**args)


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([1, 70], "got 1 at index 0"),
        ([0, 9, 8, 70], "got 8 at index 2"),
        ([0, 9], "got 9 at index 1"),
        ([0, 9, 71], "got 71 at index 2"),
    ],
)
def test_ssd_scan_rejects_wrong_bounds(cu, message):
    message = "zebra::ssd_scan: cu_seqlens must be non-decreasing from 0 to T = 70, " + message
    with pytest.raises(RuntimeError, match=message):
        ops.ssd_scan(**make(1, 70, cu=cu))
