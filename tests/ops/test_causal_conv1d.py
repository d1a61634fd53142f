"""causal_conv1d, its gradients and its one-token step against their fp64 truth, on every device."""

from itertools import pairwise

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_rejected

from zebra import _extension, ops
from zebra.ops import conv, reference
from zebra.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch, tokens, channels, width=4, dtype=torch.float32, device="cpu", **options):
    """Arguments of causal_conv1d; options: bias, state, cu_seqlens (a list), weight_dtype."""
    weight_dtype, cu = options.get("weight_dtype") or dtype, options.get("cu_seqlens")

    def normal(*shape):
        return torch.randn(shape).to(device)  # the same inputs on every device

    n_seq = batch if cu is None else len(cu) - 1
    return {
        "x": normal(batch, tokens, channels).to(dtype),
        "weight": (normal(channels, width) / width**0.5).to(weight_dtype),
        "bias": normal(channels).to(weight_dtype) if options.get("bias", True) else None,
        "initial_state": normal(n_seq, channels, width - 1).to(dtype)
        if options.get("state", True)
        else None,
        "cu_seqlens": None if cu is None else torch.tensor(cu, dtype=torch.int32, device=device),
        "activation": options.get("activation", "silu"),
    }


def double(args):
    return {
        k: v.detach().double().cpu() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in args.items()
    }


def check_forward(args):
    got = ops.causal_conv1d(**args)
    truth, eager = reference.causal_conv1d(**double(args)), reference.causal_conv1d(**args)
    factor = tolerances.factor("causal_conv1d", args["x"].dtype)
    assert_close(got[0], truth[0], eager[0], factor, "y")
    assert torch.equal(got[1], eager[1]), "the final state is a copy of rows"


def gradients(fn, args, dy, dstate):
    leaves = {
        k: v.detach().clone().requires_grad_()
        for k, v in args.items()
        if torch.is_tensor(v) and v.is_floating_point()
    }
    y, state = fn(**{**args, **leaves})
    return dict(
        zip(
            leaves,
            torch.autograd.grad((y, state), list(leaves.values()), (dy, dstate)),
            strict=True,
        )
    )


def check_gradients(args):
    y, state = ops.causal_conv1d(**args)
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    got = gradients(ops.causal_conv1d, args, dy, dstate)
    truth = gradients(
        reference.causal_conv1d, double(args), dy.double().cpu(), dstate.double().cpu()
    )
    eager = gradients(reference.causal_conv1d, args, dy, dstate)
    for name in got:
        factor = tolerances.factor("causal_conv1d.gradient", got[name].dtype)
        assert_close(got[name], truth[name], eager[name], factor, f"d{name}")


PACKED = [0, 0, 3, 3, 4, 70, 128, 128, 300, 300]  # empty at both ends, shorter than W, across tiles


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 63, 64, 65, 300])
def test_causal_conv1d_matches_reference(tokens, width, dtype, device):
    check_forward(make(2, tokens, 72, width, dtype, device))


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["batch", "packed"])
def test_causal_conv1d_matches_reference_with_every_option(
    cu_seqlens, bias, state, activation, device
):
    args = make(
        1, 300, 40, 4, torch.bfloat16, device,
        bias=bias, state=state, activation=activation, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    check_forward(args)
    check_gradients(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 8, 129, 2056])
def test_causal_conv1d_takes_any_number_of_channels(channels, dtype, device):
    args = make(2, 19, channels, 4, dtype, device)
    check_forward(args)
    # A few fp32 sums can cancel by chance: their relative error has no bound.
    if channels > 100 or dtype != torch.float32:
        check_gradients(args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [24, 25])
def test_causal_conv1d_takes_float32_parameters(channels, dtype, device):
    args = make(2, 9, channels, 4, dtype, device, weight_dtype=torch.float32)
    check_forward(args)
    check_gradients(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 65, 300])
def test_causal_conv1d_gradients_match_reference(tokens, width, dtype, device):
    check_gradients(make(3, tokens, 24, width, dtype, device))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("cu_seqlens", [PACKED, list(range(301)), [0, 300]], ids=len)
def test_causal_conv1d_gradients_match_reference_when_packed(cu_seqlens, width, device):
    args = make(1, 300, 24, width, torch.float32, device, cu_seqlens=cu_seqlens)
    check_forward(args)
    check_gradients(args)


def test_causal_conv1d_gradients_match_reference_over_many_tiles(device):
    check_gradients(make(5, 700, 16, 4, torch.float32, device))
    check_gradients(make(700, 3, 16, 4, torch.float32, device))  # rows that share a tile


@settings(max_examples=40, deadline=None)
@given(data=st.data(), width=st.integers(2, 4), channels=st.integers(24, 600))
def test_causal_conv1d_matches_reference_at_any_shape(data, width, channels):
    tokens = data.draw(st.integers(0, 40))
    options = {k: data.draw(st.booleans()) for k in ("bias", "state")}
    options["activation"] = data.draw(st.sampled_from(["silu", "none"]))
    if data.draw(st.booleans()):
        cuts = data.draw(st.lists(st.integers(0, tokens), max_size=6))
        args = make(1, tokens, channels, width, cu_seqlens=[0, *sorted(cuts), tokens], **options)
    else:
        args = make(data.draw(st.integers(1, 4)), tokens, channels, width, **options)
    check_forward(args)
    check_gradients(args)


@pytest.mark.parametrize("offset", [16, 17])
def test_causal_conv1d_reads_views_in_place(offset, device):
    wide = torch.randn(2, 20, 200, device=device)
    args = make(2, 20, 64, device=device)
    view = wide[:, :, offset : offset + 64]
    copy = {**args, "x": view.contiguous()}
    torch.testing.assert_close(
        ops.causal_conv1d(**{**args, "x": view}), ops.causal_conv1d(**copy), rtol=0, atol=0
    )
    dy, dstate = wide[:, :, offset + 64 : offset + 128], torch.randn_like(args["initial_state"])
    got = gradients(ops.causal_conv1d, {**args, "x": view}, dy, dstate)
    want = gradients(ops.causal_conv1d, copy, dy.contiguous(), dstate)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_causal_conv1d_gradient_takes_any_dy(device):
    args = make(2, 20, 64, device=device, state=False)
    dstate = torch.zeros(2, 64, 3, device=device)
    dense = torch.randn(2, 20, 64, device=device)
    for dy in (dense.mT.contiguous().mT, dense[:, :1, :1].expand_as(dense)):
        got = gradients(ops.causal_conv1d, args, dy, dstate)
        want = gradients(ops.causal_conv1d, args, dy.contiguous(), dstate)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_causal_conv1d_gradient_of_the_final_state_alone(device):
    args = make(2, 2, 8, 4, device=device)
    x, state = args["x"].requires_grad_(), args["initial_state"].requires_grad_()
    _, final = ops.causal_conv1d(**args)
    dx, dstate = torch.autograd.grad(final.sum(), (x, state))
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dstate, torch.tensor([0.0, 0.0, 1.0], device=device).expand_as(state))


@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 2, 7]], ids=["batch", "packed"])
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_causal_conv1d_passes_gradcheck(width, activation, cu_seqlens):
    args = make(1, 7, 2, width, torch.float64, cu_seqlens=cu_seqlens, activation=activation)
    leaves = [args[k].requires_grad_() for k in ("x", "weight", "bias", "initial_state")]

    def call(*tensors):
        return ops.causal_conv1d(*tensors, args["cu_seqlens"], activation)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 2, 7]], ids=["batch", "packed"])
@pytest.mark.parametrize("optional", [False, True])
def test_causal_conv1d_passes_opcheck(optional, cu_seqlens, device):
    args = make(1, 7, 16, device=device, bias=optional, state=optional, cu_seqlens=cu_seqlens)
    for name in ("x", "weight", "bias", "initial_state"):
        if args[name] is not None:
            args[name].requires_grad_()
    torch.library.opcheck(torch.ops.zebra.causal_conv1d.default, tuple(args.values()))
    detached = [t.detach() if torch.is_tensor(t) else t for t in args.values()]
    dy = torch.randn(1, 7, 16, device=device)
    dstate = torch.randn(1 if cu_seqlens is None else 3, 16, 3, device=device)
    torch.library.opcheck(
        torch.ops.zebra.causal_conv1d_backward.default,
        (dy, dstate if optional else None, *detached),
    )


def test_causal_conv1d_compiles_fullgraph(device):
    args = make(2, 7, 16, device=device)
    compiled = torch.compile(ops.causal_conv1d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args), ops.causal_conv1d(**args), rtol=0, atol=0)


def test_causal_conv1d_is_deterministic(device):
    args = make(2, 777, 520, 4, torch.bfloat16, device)
    dy, dstate = torch.randn_like(args["x"]), torch.randn_like(args["initial_state"])
    want = gradients(ops.causal_conv1d, args, dy, dstate)
    for _ in range(4):
        got = gradients(ops.causal_conv1d, args, dy, dstate)
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_causal_conv1d_does_not_depend_on_the_number_of_threads():
    args = make(2, 777, 520)
    dy, dstate = torch.randn_like(args["x"]), torch.randn_like(args["initial_state"])
    threads, results = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(gradients(ops.causal_conv1d, args, dy, dstate))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize("channels", [16, 17])
def test_causal_conv1d_keeps_nan_in_its_sequence(channels, device):
    cu = [0, 5, 9, 140]
    args = make(1, 140, channels, device=device, cu_seqlens=cu)
    args["x"][0, 5:9] = float("nan")
    args["initial_state"][1] = float("nan")
    y, state = ops.causal_conv1d(**args)
    assert y[0, 5:9].isnan().all() and state[1].isnan().all()
    assert y[0, :5].isfinite().all() and y[0, 9:].isfinite().all()
    assert state[[0, 2]].isfinite().all()
    dy = torch.ones_like(y)
    dx, _, _, dstate = torch.ops.zebra.causal_conv1d_backward(dy, None, *args.values())
    assert dx[0, :5].isfinite().all() and dx[0, 9:].isfinite().all()
    assert dstate[[0, 2]].isfinite().all()


@pytest.mark.parametrize("width", [2, 3])
def test_causal_conv1d_reads_no_row_beyond_its_width(width, device):
    args = make(1, 12, 16, width, device=device, state=False)
    args["x"][0, 4] = float("nan")
    y, _ = ops.causal_conv1d(**args)
    assert y[0, 4 : 4 + width].isnan().all()
    assert y[0, :4].isfinite().all() and y[0, 4 + width :].isfinite().all()


@pytest.mark.parametrize("cut", [1, 2, 64, 129, 298])
def test_causal_conv1d_of_two_halves_equals_the_whole(cut, device):
    args = make(2, 300, 24, 4, torch.bfloat16, device)
    y, state = ops.causal_conv1d(**args)
    first, middle = ops.causal_conv1d(**{**args, "x": args["x"][:, :cut]})
    second, last = ops.causal_conv1d(**{**args, "x": args["x"][:, cut:], "initial_state": middle})
    assert torch.equal(torch.cat([first, second], 1), y) and torch.equal(last, state)


def test_causal_conv1d_of_packed_sequences_equals_separate_calls(device):
    args = make(1, 300, 24, 4, torch.bfloat16, device, cu_seqlens=PACKED)
    y, state = ops.causal_conv1d(**args)
    for i, (first, end) in enumerate(pairwise(PACKED)):
        alone = {
            **args,
            "x": args["x"][:, first:end],
            "initial_state": args["initial_state"][i : i + 1],
            "cu_seqlens": None,
        }
        y_alone, state_alone = ops.causal_conv1d(**alone)
        assert torch.equal(y_alone, y[:, first:end]) and torch.equal(state_alone[0], state[i])


def test_causal_conv1d_saturates_without_nan(device):
    x = torch.tensor([-1e30, -200.0, -88.5, 0.0, 88.5, 200.0, 1e30], device=device)
    weight = torch.tensor([[0.0, 1.0]], device=device)
    y, _ = ops.causal_conv1d(x.view(1, -1, 1), weight)
    torch.testing.assert_close(y.flatten(), torch.nn.functional.silu(x), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["batch", "packed"])
def test_causal_conv1d_composite_matches_reference(cu_seqlens, optional, activation, device):
    args = make(
        1 if cu_seqlens else 3, 300, 24, 4, torch.float32, device,
        bias=optional, state=optional, activation=activation, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    y, state = conv._causal_conv1d_composite(**args)
    truth, eager = reference.causal_conv1d(**double(args)), reference.causal_conv1d(**args)
    assert_close(y, truth[0], eager[0], tolerances.factor("causal_conv1d", y.dtype), "y")
    assert torch.equal(state, eager[1])
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    got = conv._causal_conv1d_backward_composite(dy, dstate, *args.values())
    want = torch.ops.zebra.causal_conv1d_backward(dy, dstate, *args.values())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_causal_conv1d_survives_graph_replay():
    args = make(1, 300, 64, 4, torch.bfloat16, "cuda", cu_seqlens=[0, 100, 100, 300])

    def run():
        y, state = ops.causal_conv1d(**args)
        grads = torch.ops.zebra.causal_conv1d_backward(y, state, *args.values())
        return [y, state, *grads]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    args["x"].normal_()
    args["cu_seqlens"].copy_(torch.tensor([0, 7, 250, 300], dtype=torch.int32))
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("cu", [[0, 900, 5, 300], [-7, 300, -9, 9], [50, 50, 50, 50], [9, 3, 1, 0]])
def test_causal_conv1d_stays_in_bounds_with_wrong_cu_seqlens_on_a_gpu(cu):
    args = make(1, 300, 64, 4, torch.float32, "cuda", cu_seqlens=cu)
    y, state = ops.causal_conv1d(**args)
    grads = torch.ops.zebra.causal_conv1d_backward(y, state, *args.values())
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in (y, state, *grads))


@pytest.mark.gpu
@pytest.mark.slow
def test_causal_conv1d_reaches_beyond_2_31_elements():
    tokens, stride, channels = 70_000, 32_768, 64  # 2.3e9 elements, 4.6 GB
    wide = torch.zeros(1, tokens, stride, dtype=torch.bfloat16, device="cuda")
    view = wide[:, :, -channels:]
    view.normal_()
    args = make(1, 1, channels, 4, torch.bfloat16, "cuda", state=False)
    for cu in (None, torch.tensor([0, 69_000, tokens], dtype=torch.int32, device="cuda")):
        results = []
        for x in (view, view.contiguous()):
            call = {**args, "x": x, "cu_seqlens": cu}
            y, state = ops.causal_conv1d(**call)
            grads = torch.ops.zebra.causal_conv1d_backward(view, state, *call.values())
            results.append((y, state, *grads))
        for wide_result, compact_result in zip(*results, strict=True):
            assert torch.equal(wide_result, compact_result)


REJECTED = {
    "x_rank": ({"x": lambda t: t[0]}, r"x must be \[B, T, C\]"),
    "x_dtype": ({"x": lambda t: t.int()}, "x must be float32, bfloat16 or float16"),
    "x_strides": ({"x": lambda t: t.mT.contiguous().mT}, "x must be contiguous in its last"),
    "no_channels": ({"x": lambda t: t[:, :, :0]}, "x must be non-empty in its last dimension"),
    "weight_shape": (
        {"weight": lambda t: t[:5]},
        r"weight must be \[C, W\] = \[8, any\], got \[5, 4\]",
    ),
    "weight_width": (
        {"weight": lambda t: t.repeat(1, 2)},
        r"weight must be \[C, W\] with W 2, 3 or 4, got \[8, 8\]",
    ),
    "weight_dtype": ({"weight": lambda t: t.half()}, "weight must be float32 like x, or float32"),
    "bias_shape": ({"bias": lambda t: t[:5]}, r"bias must be \[C\] = \[8\], got \[5\]"),
    "bias_strides": ({"bias": lambda t: t.repeat(2)[::2]}, "bias must be contiguous"),
    "state_shape": (
        {"initial_state": lambda t: t[:, :, :2]},
        r"initial_state must be \[n_seq, C, W-1\] = \[2, 8, 3\], got \[2, 8, 2\]",
    ),
    "state_dtype": ({"initial_state": lambda t: t.half()}, "initial_state must be float32 like x"),
    "packed_batch": ({"x": lambda t: t.repeat(2, 1, 1)}, r"x must be \[1, T, C\] with cu_seqlens"),
    "cu_dtype": ({"cu_seqlens": lambda t: t.long()}, "cu_seqlens must be int32"),
    "cu_empty": ({"cu_seqlens": lambda t: t[:1]}, "cu_seqlens must be .* at least one sequence"),
    "activation": ({"activation": lambda _: "relu"}, "activation must be 'silu' or 'none'"),
}
REJECTED_ON_CPU = {
    "cu_start": ({"cu_seqlens": lambda t: t + 1}, "cu_seqlens must be .* from 0 to T = 6, got 1"),
    "cu_decreasing": (
        {"cu_seqlens": lambda t: t[[0, 2, 1]]},
        "cu_seqlens must be non-decreasing from 0 to T = 6, got 3 at index 2",
    ),
    "cu_end": ({"cu_seqlens": lambda t: t[:2]}, "cu_seqlens must be .* to T = 6, got 3 at index 1"),
}


def rejected(change, device):
    args = make(1, 6, 8, device=device, cu_seqlens=[0, 3, 6])
    return {k: change[k](v) if k in change else v for k, v in args.items()}


@pytest.mark.parametrize("case", REJECTED)
def test_causal_conv1d_rejects(case, device):
    change, message = REJECTED[case]
    args, message = rejected(change, device), "zebra::causal_conv1d: " + message
    assert_rejected(message, ops.causal_conv1d, conv._causal_conv1d_composite, **args)


@pytest.mark.parametrize("case", REJECTED_ON_CPU)
def test_causal_conv1d_rejects_wrong_boundaries_on_the_cpu(case):
    change, message = REJECTED_ON_CPU[case]
    with pytest.raises(RuntimeError, match="zebra::causal_conv1d: " + message):
        ops.causal_conv1d(**rejected(change, "cpu"))


bindings = pytest.mark.skipif(_extension.bindings() is None, reason="zebra._C was not built")


@bindings
def test_causal_conv1d_config_covers_the_problem_and_keeps_overheads_small():
    from zebra import _C

    for shape in [(2, 8192, 6144), (1, 16384, 3072), (8, 2048, 5120), (1, 1, 8), (4096, 3, 64)]:
        for backward in (False, True):
            batch, tokens, channels = shape
            c = _C.select_config(
                "causal_conv1d", batch=batch, tokens=tokens, channels=channels, backward=backward
            )
            assert c["threads"] % 32 == 0 and c["vec"] == 8
            assert c["threads"] * c["vec"] * c["channel_blocks"] >= channels
            assert c["tile"] * (c["tiles"] - 1) < tokens <= c["tile"] * c["tiles"]
            assert (c["partials"] - 1) * c["items"] < batch * c["tiles"]
            assert c["items"] == 1 or c["tile"] * c["items"] <= 32  # short rows share a CTA
            assert c["partials"] * c["items"] >= batch * c["tiles"]
    forward = _C.select_config("causal_conv1d", batch=2, tokens=8192, channels=6144)
    assert 8 <= forward["tile"] <= 20  # short, so that running CTAs share a stretch of memory
    backward = _C.select_config("causal_conv1d", batch=2, tokens=8192, channels=6144, backward=True)
    partial_bytes = 2 * 4 * backward["partials"] * 5 * 6144
    assert partial_bytes < 0.03 * 3 * 2 * 2 * 8192 * 6144


@bindings
def test_causal_conv1d_config_takes_one_channel_a_thread_when_misaligned():
    from zebra import _C

    c = _C.select_config("causal_conv1d", batch=1, tokens=9, channels=33, aligned=False)
    assert c["vec"] == 1 and c["threads"] == 64
