"""mamba2_step against its fp64 truth, and against a scan over the same tokens, on every device."""

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_rejected

from zebra import ops
from zebra.ops import reference
from zebra.ops.step import _mamba2_step_composite
from zebra.testing import assert_close, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "conv_state", "ssm_state")
H, P, N, G, W = 6, 16, 24, 2, 4


def make(
    batch=3,
    dtype=torch.float32,
    device="cpu",
    heads=H,
    headdim=P,
    d_state=N,
    groups=G,
    width=W,
    slots=None,
    state_dtype=None,
    bias=True,
    norm=True,
    parameter_dtype=None,
):
    """The arguments of one step: decays and step sizes as a trained mixer has them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slots = batch if slots is None else slots
    channels = groups * (headdim + d_state) + heads * d_state

    def rand(*shape, dtype=parameter_dtype or dtype):
        return torch.randn(*shape, device=device).to(dtype)

    return {
        "zxbcdt": rand(batch, heads * headdim + channels + heads, dtype=dtype),
        "conv_state": rand(slots, channels, width - 1, dtype=dtype),
        "ssm_state": rand(slots, heads, headdim, d_state, dtype=state_dtype or wide),
        "conv_weight": rand(channels, width) / width**0.5,
        "conv_bias": rand(channels) if bias else None,
        "dt_bias": rand(heads) - 2,
        "A": -torch.empty(heads, device=device, dtype=wide).uniform_(0.5, 16),
        "D": rand(heads),
        "norm_weight": 1 + 0.1 * rand(heads * headdim) if norm else None,
        "n_groups": groups,
    }


def convert(args, fn):
    return {k: fn(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def double(t):
    return t.detach().cpu().double() if t.is_floating_point() else t.cpu()


def run(args, op=ops.mamba2_step):
    """(y, conv_state, ssm_state) of an operator that updates its states, which stay untouched."""
    args = {
        **args,
        "conv_state": args["conv_state"].clone(),
        "ssm_state": args["ssm_state"].clone(),
    }
    return op(**args), args["conv_state"], args["ssm_state"]


def check(args, op=ops.mamba2_step):
    got = run(args, op)
    truth, eager = reference.mamba2_step(**convert(args, double)), reference.mamba2_step(**args)
    for name, g, t, e in zip(NAMES, got, truth, eager, strict=True):
        assert g.dtype == e.dtype
        assert_close(g, t, e, tolerances.factor("mamba2_step", g.dtype), name)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [
        (H, P, N, G, W),
        (4, 64, 64, 1, 4),
        (3, 7, 5, 3, 2),
        (8, 32, 128, 8, 3),
        (6, 128, 128, 2, 4),
        (2, 200, 64, 1, 4),
    ],
    ids=str,
)
def test_mamba2_step_matches_reference(shape, batch, dtype, device):
    heads, headdim, d_state, groups, width = shape
    check(make(batch, dtype, device, heads, headdim, d_state, groups, width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("d_state", [N, 64, 128])
def test_mamba2_step_keeps_a_16_bit_state(d_state, parameter_dtype, dtype, device):
    kinds = {"state_dtype": dtype, "parameter_dtype": parameter_dtype}
    check(make(2, dtype, device, d_state=d_state, **kinds))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_mamba2_step_takes_an_optional_bias_and_norm(bias, norm, device):
    check(make(bias=bias, norm=norm, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, "same"])
def test_mamba2_step_composite_matches_reference(state_dtype, dtype):
    args = make(4, dtype, slots=6, state_dtype=dtype if state_dtype else None)
    for indices in (None, [3, 0, 5, 1], [-1, 0, 4, -7], [2, -1, -1, 0], [-1, -1, -1, -1]):
        index = None if indices is None else torch.tensor(indices, dtype=torch.int32)
        check({**args, "state_indices": index}, _mamba2_step_composite)
    check(make(4, dtype, bias=False, norm=False), _mamba2_step_composite)
    empty = _mamba2_step_composite(**make(0))
    assert empty.shape == (0, H * P)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 4),
    share=st.integers(1, 4),
    groups=st.integers(1, 3),
    headdim=st.integers(1, 9),
    d_state=st.integers(1, 40),
    width=st.integers(1, 5),
)
def test_mamba2_step_matches_reference_at_any_shape(batch, share, groups, headdim, d_state, width):
    check(make(batch, torch.float32, "cpu", share * groups, headdim, d_state, groups, width))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_mamba2_step_touches_only_the_slots_of_its_rows(data):
    slots = data.draw(st.integers(1, 6))
    indices = data.draw(st.lists(st.integers(-2, slots - 1), max_size=5))
    indices = [s for i, s in enumerate(indices) if s < 0 or s not in indices[:i]]
    args = make(len(indices), slots=slots)
    args["state_indices"] = torch.tensor(indices, dtype=torch.int32)
    y, conv, ssm = check(args)
    for b, slot in enumerate(indices):
        if slot < 0:
            assert (y[b] == 0).all()
    untouched = [s for s in range(slots) if s not in indices]
    assert torch.equal(conv[untouched], args["conv_state"][untouched])
    assert torch.equal(ssm[untouched], args["ssm_state"][untouched])


def test_mamba2_step_padding_rows_read_and_write_nothing(device):
    args = make(3, slots=2, device=device)
    args["state_indices"] = torch.tensor([-1, 0, -1], dtype=torch.int32, device=device)
    want = run(args)
    args["zxbcdt"][[0, 2]] = float("nan")
    for got in (run(args), run(args)):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    args["conv_state"][1], args["ssm_state"][1] = float("nan"), float("nan")
    y, conv, ssm = run(args)
    assert torch.equal(y, want[0]) and conv[1].isnan().all() and ssm[1].isnan().all()


def test_mamba2_step_keeps_nan_in_its_row(device):
    args = make(3, device=device)
    want = run(args)
    args["zxbcdt"][1] = float("nan")
    got = run(args)
    assert got[0][1].isnan().all() and got[2][1].isnan().all()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g[[0, 2]], w[[0, 2]])


def test_mamba2_step_works_in_views_of_wider_memory(device):
    args = make(3, slots=4, device=device)
    want = run(args)

    def pool(t, gap):
        wide = t.new_full((t.size(0), t[0].numel() + gap), float("nan"))
        view = wide[:, : t[0].numel()].view(t.shape)
        view.copy_(t)
        return wide, view

    row_memory, row = pool(args["zxbcdt"], 5)
    conv_memory, conv = pool(args["conv_state"], 3)
    ssm_memory, ssm = pool(args["ssm_state"], 7)
    y = ops.mamba2_step(**{**args, "zxbcdt": row, "conv_state": conv, "ssm_state": ssm})
    for g, w in zip((y, conv, ssm), want, strict=True):
        assert torch.equal(g, w)
    for memory, gap in ((row_memory, 5), (conv_memory, 3), (ssm_memory, 7)):
        assert memory[:, -gap:].isnan().all()


def scan(zxbcdt, args):
    """The same tokens [B, T, d_in_proj] through the prefill operators' references, in fp64."""
    a = convert(args, double)
    heads, headdim, d_state = a["ssm_state"].shape[1:]
    groups, channels = a["n_groups"], a["conv_weight"].size(0)
    z, xbc, dt = double(zxbcdt).split([heads * headdim, channels, heads], dim=-1)
    xbc, conv = reference.causal_conv1d(xbc, a["conv_weight"], a["conv_bias"], a["conv_state"])
    x, B, C = xbc.split([groups * headdim, groups * d_state, heads * d_state], dim=-1)
    y, ssm = reference.ssd_scan(
        x.unflatten(-1, (groups, headdim)),
        dt,
        a["A"],
        B.unflatten(-1, (groups, d_state)),
        C.unflatten(-1, (heads, d_state)),
        a["D"],
        z.unflatten(-1, (heads, headdim)),
        a["dt_bias"],
        a["norm_weight"],
        a["ssm_state"],
    )
    return y.flatten(-2), conv, ssm


def steps(zxbcdt, args, op=ops.mamba2_step):
    return torch.stack([op(**{**args, "zxbcdt": row}) for row in zxbcdt.unbind(1)], dim=1)


@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(1, 40), composite=st.booleans())
def test_mamba2_step_equals_the_scan(tokens, composite):
    args = make(2, heads=4, headdim=8, d_state=12, groups=2)
    zxbcdt = torch.randn(2, tokens, args["zxbcdt"].size(1))
    want = scan(zxbcdt, args)
    op = _mamba2_step_composite if composite else ops.mamba2_step
    got = steps(zxbcdt, args, op), args["conv_state"], args["ssm_state"]
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert relative_error(g, w) < 2e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mamba2_step_error_does_not_grow_with_a_float32_state(dtype):
    """Every token of 300 is as good as one rounding of y; a 16-bit state costs a bounded factor."""
    errors = {}
    for state_dtype in (torch.float32, dtype):
        torch.manual_seed(1)
        args = make(1, dtype, heads=4, headdim=16, d_state=16, groups=2, state_dtype=state_dtype)
        args["ssm_state"].zero_()
        args["A"].fill_(-1.0)
        zxbcdt = torch.randn(1, 300, args["zxbcdt"].size(1)).to(dtype)
        want = scan(zxbcdt, args)[0]
        got = steps(zxbcdt, args)
        errors[state_dtype] = [
            relative_error(got[:, t : t + 100], want[:, t : t + 100]) for t in (0, 100, 200)
        ]
    eps = torch.finfo(dtype).eps
    assert max(errors[torch.float32]) < 0.3 * eps  # one rounding: eps / sqrt(12) = 0.29 eps
    assert max(errors[dtype]) < 8 * eps and max(errors[dtype]) > max(errors[torch.float32])


@pytest.mark.parametrize("dt", [-30.0, -5.0, 20.0, 1e3])
@pytest.mark.parametrize("decay", [-0.0, -1e-6, -1e4])
def test_mamba2_step_matches_reference_at_extreme_decays(decay, dt, device):
    args = make(2, device=device)
    args["A"].fill_(decay), args["dt_bias"].zero_()
    args["zxbcdt"][:, -H:] = dt
    _, _, ssm = check(args)
    assert ssm.isfinite().all()


def test_mamba2_step_of_infinite_dt_forgets_the_state(device):
    args = make(1, norm=False, device=device)
    args["dt_bias"].fill_(-float("inf"))  # d = 0: the state stays as it is
    assert torch.equal(run(args)[2], args["ssm_state"])


def test_mamba2_step_passes_opcheck(device):
    for indices in (None, [2, -1, 0]):
        args = make(3, slots=4, device=device)
        index = None if indices is None else torch.tensor(indices, dtype=torch.int32, device=device)
        torch.library.opcheck(torch.ops.zebra.mamba2_step.default, (*args.values(), index, 1e-5))


def test_mamba2_step_compiles_fullgraph(device):
    args = make(3, device=device)
    want = run(args)
    got = run(args, torch.compile(ops.mamba2_step, fullgraph=True, backend="aot_eager"))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_mamba2_step_carries_no_gradient(device):
    args = make(2, device=device)
    args["zxbcdt"].requires_grad_(), args["conv_weight"].requires_grad_()
    assert not ops.mamba2_step(**args).requires_grad
    assert not args["ssm_state"].requires_grad and not args["conv_state"].requires_grad


def test_mamba2_step_is_deterministic_at_any_thread_count(device):
    args = make(5, torch.bfloat16, device, 8, 32, 64, 4)
    first, threads = run(args), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(run(args), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_mamba2_step_survives_graph_replay_with_other_slots():
    args = make(4, torch.bfloat16, "cuda", slots=6)
    args["state_indices"] = torch.tensor([0, 1, 2, 3], dtype=torch.int32, device="cuda")
    ops.mamba2_step(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.mamba2_step(**args)
    args["state_indices"].copy_(torch.tensor([5, -1, 0, 2], dtype=torch.int32))
    args["zxbcdt"].normal_()
    want = run(args)
    graph.replay()
    for g, w in zip((y, args["conv_state"], args["ssm_state"]), want, strict=True):
        assert torch.equal(g, w)


MANY_ROWS = 48  # from some number of heads on a GPU deals them out in another way


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(dtype, torch.float32) for dtype in DTYPES] + [(dtype, dtype) for dtype in DTYPES[1:]],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [(32, 128, 128, 8), (24, 100, 64, 8), (32, 136, 128, 1), (32, 64, 64, 8), (24, 32, 128, 3)],
    ids=str,
)
def test_mamba2_step_of_many_rows_is_that_of_each(shape, dtype, state_dtype):
    heads, headdim, d_state, groups = shape
    sizes = {"heads": heads, "headdim": headdim, "d_state": d_state, "groups": groups}
    args = make(MANY_ROWS, dtype, "cuda", state_dtype=state_dtype, **sizes)
    got = check(args)
    for row in (0, 17, MANY_ROWS - 1):
        own = {k: args[k][row : row + 1] for k in ("zxbcdt", "conv_state", "ssm_state")}
        for all_rows, one in zip(got, run({**args, **own}), strict=True):
            assert torch.equal(all_rows[row : row + 1], one)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("present", ["some", "none"])
def test_mamba2_step_of_many_rows_touches_their_slots_alone(present, norm):
    args = make(MANY_ROWS, torch.bfloat16, "cuda", 32, 128, 128, 8, slots=64, norm=norm)
    index = torch.randperm(64)[:MANY_ROWS].int()
    index[[0, 5, 6, 7, -1] if present == "some" else slice(None)] = -1
    index[17] = 64  # no such slot
    args["state_indices"] = index.cuda()
    y, *states = run(args)
    assert not y[index < 0].any() and y[17].isnan().all()
    there = (index >= 0) & (index < 64)
    slots = index[there].long().cuda()
    own = {"zxbcdt": args["zxbcdt"][there.cuda()], "state_indices": None}
    own |= {k: args[k][slots] for k in ("conv_state", "ssm_state")}
    y_alone, *states_alone = run({**args, **own})
    assert torch.equal(y[there.cuda()], y_alone)
    left = torch.ones(64, dtype=torch.bool, device="cuda").index_fill(0, slots, False)
    for name, new, alone in zip(NAMES[1:], states, states_alone, strict=True):
        assert torch.equal(new[left], args[name][left])
        assert torch.equal(new[slots], alone)


@pytest.mark.parametrize("op", [ops.mamba2_step, _mamba2_step_composite])
def test_mamba2_step_takes_the_logarithm_of_the_decay(op, device):
    args = make(device=device)
    logs = {**args, "A": torch.log(-args["A"]), "A_is_log": True}
    for name, got, want in zip(NAMES, run(logs, op), run(args, op), strict=True):
        assert relative_error(got, want) < 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("d_state", [N, 128])
def test_mamba2_step_gives_nan_for_a_slot_that_does_not_exist(d_state):
    args = make(3, torch.bfloat16, "cuda", d_state=d_state, slots=3)
    args["state_indices"] = torch.tensor([2, 3, 0], dtype=torch.int32, device="cuda")
    y, conv, ssm = run(args)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    assert torch.equal(conv[1], args["conv_state"][1])
    assert torch.equal(ssm[1], args["ssm_state"][1])


def change(name, fn):
    return lambda a: {**a, name: fn(a[name])}


def indices(*values, dtype=torch.int32):
    def changed(a):
        return {**a, "state_indices": torch.tensor(values, dtype=dtype).to(a["A"].device)}

    return changed


REJECTED = {
    "row_width": (
        change("zxbcdt", lambda t: t[:, 1:]),
        r"zxbcdt must be \[B, H P \+ G \(P \+ N\) \+ H N \+ H\] = \[any, 326\], got \[3, 325\]",
    ),
    "row_stride": (change("zxbcdt", lambda t: t.t().contiguous().t()), "zxbcdt must be contiguous"),
    "integers": (
        change("zxbcdt", lambda t: t.int()),
        "zxbcdt must be float32, bfloat16 or float16",
    ),
    "conv_dtype": (change("conv_state", torch.Tensor.half), "conv_state must be float32 like"),
    "conv_slots": (change("conv_state", lambda t: t[:2]), r"conv_state must be \[slots, C, W-1\]"),
    "conv_overlap": (
        change("conv_state", lambda t: t[:1].expand(3, -1, -1)),
        "conv_state must be contiguous within a slot, with slots at least 672 elements apart",
    ),
    "ssm_rank": (change("ssm_state", lambda t: t[0]), r"ssm_state must be \[slots, H, P, N\]"),
    "ssm_dtype": (change("ssm_state", torch.Tensor.half), "ssm_state must be float32 or float32"),
    "ssm_strides": (
        change("ssm_state", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        "ssm_state must be contiguous within a slot",
    ),
    "few_slots": (
        lambda a: {**a, "conv_state": a["conv_state"][:2], "ssm_state": a["ssm_state"][:2]},
        "ssm_state must be .* with slots >= B = 3",
    ),
    "weight_shape": (change("conv_weight", lambda t: t[1:]), r"conv_weight must be \[C, W\] ="),
    "weight_dtype": (
        change("conv_weight", torch.Tensor.half),
        "conv_weight must be float32 like zxbcdt, or float32, got",
    ),
    "bias_shape": (change("conv_bias", lambda t: t[:5]), r"conv_bias must be \[C\] = \[224\]"),
    "dt_bias_shape": (change("dt_bias", lambda t: t[:5]), r"dt_bias must be \[H\] = \[6\], got"),
    "D_stride": (change("D", lambda t: t.repeat(2)[::2]), "D must be contiguous"),
    "A_dtype": (change("A", torch.Tensor.half), "A must be float32, got"),
    "norm_shape": (change("norm_weight", lambda t: t[:P]), r"norm_weight must be \[H P\] = \[96\]"),
    "groups": (lambda a: {**a, "n_groups": 4}, "n_groups must be a divisor of H = 6, got 4"),
    "no_groups": (lambda a: {**a, "n_groups": 0}, "n_groups must be a divisor of H = 6, got 0"),
    "index_dtype": (indices(0, 1, 2, dtype=torch.int64), "state_indices must be int32"),
    "index_count": (indices(0, 1), r"state_indices must be \[B\] = \[3\], got \[2\]"),
}
REJECTED_ON_CPU = {
    "A_positive": (change("A", torch.Tensor.neg), "A must be <= 0 .*, got .* at head 0"),
    "index_range": (indices(0, 3, 1), "state_indices must be less than slots = 3, got 3 in row 1"),
    "index_twice": (indices(1, -1, 1), "state_indices must be distinct .*, got 1 in row 2"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_mamba2_step_rejects(case, device):
    """And writes nothing."""
    alter, message = REJECTED[case]
    args = alter(make(3, device=device))
    conv, ssm = args["conv_state"].clone(), args["ssm_state"].clone()
    message = "zebra::mamba2_step: " + message
    assert_rejected(message, ops.mamba2_step, _mamba2_step_composite, **args)
    assert torch.equal(args["conv_state"], conv) and torch.equal(args["ssm_state"], ssm)


@pytest.mark.parametrize("case", REJECTED_ON_CPU)
def test_mamba2_step_rejects_wrong_values_on_the_cpu(case):
    """And writes nothing."""
    alter, message = REJECTED_ON_CPU[case]
    args = alter(make(3))
    conv, ssm = args["conv_state"].clone(), args["ssm_state"].clone()
    with pytest.raises(RuntimeError, match="zebra::mamba2_step: " + message):
        ops.mamba2_step(**args)
    assert torch.equal(args["conv_state"], conv) and torch.equal(args["ssm_state"], ssm)
