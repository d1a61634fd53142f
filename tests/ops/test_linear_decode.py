"""linear_decode against its fp64 truth, on every device."""

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_rejected

from zebra import ops
from zebra.ops import reference
from zebra.ops.linear import _linear_decode_composite
from zebra.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STREAMED = 4  # rows that the CPU kernel multiplies itself at every dtype


def make(
    rows=(3,), outputs=40, K=96, dtype=torch.float32, device="cpu", swiglu=False, norm_dtype=None
):
    """x, weight, norm_weight, bias, residual, activation: with everything that may be fused."""
    wide = 2 * outputs if swiglu else outputs

    def rand(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    return [
        rand(*rows, K),
        rand(wide, K) / K**0.5,
        (1 + 0.1 * torch.randn(K, device=device)).to(norm_dtype or dtype),
        rand(wide),
        rand(*rows, outputs),
        "swiglu" if swiglu else "none",
    ]


def double(args):
    return [a.double().cpu() if isinstance(a, torch.Tensor) else a for a in args]


def check(args, op=ops.linear_decode, name="linear_decode"):
    got, truth, eager = (
        op(*args),
        reference.linear_decode(*double(args)),
        reference.linear_decode(*args),
    )
    assert got.dtype == args[0].dtype
    assert_close(got, truth, eager, tolerances.factor(name, args[0].dtype), "y")
    return got


def where(device, rows):
    """Which tolerance holds: all in fp32, or a matrix product rounded to the dtype."""
    return "linear_decode" if device == "cpu" and rows <= STREAMED else "linear_decode.matmul"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("rows", [(1,), (4,), (2, 17), (128,), ()], ids=str)
@pytest.mark.parametrize("outputs,K", [(40, 96), (65, 130), (7, 1000)])
def test_linear_decode_matches_reference(outputs, K, rows, swiglu, dtype, device):
    count = torch.Size(rows).numel()
    check(make(rows, outputs, K, dtype, device, swiglu), name=where(device, count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("rows", [1, 100])
def test_linear_decode_fuses_any_subset(rows, swiglu, dtype, device):
    args = make((rows,), dtype=dtype, device=device, swiglu=swiglu)
    for kept in range(8):
        subset = [a if kept >> i & 1 else None for i, a in enumerate(args[2:5])]
        check([*args[:2], *subset, args[5]], name=where(device, rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 100])
def test_linear_decode_takes_a_float32_norm_weight(rows, dtype, device):
    args = make((rows,), dtype=dtype, device=device, norm_dtype=torch.float32)
    check(args, name=where(device, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swiglu", [False, True])
def test_linear_decode_composite_matches_reference(swiglu, dtype):
    args = make((2, 3), dtype=dtype, swiglu=swiglu)
    check(args, _linear_decode_composite, "linear_decode.matmul")
    subset = [*args[:2], None, None, None, args[5]]
    check(subset, _linear_decode_composite, "linear_decode.matmul")


def apart(args):
    """The same call with gate and up as two parameters."""
    gate, up = (w.clone() for w in args[1].chunk(2))
    return {"args": (args[0], gate, *args[2:], 1e-5), "kwargs": {"up_weight": up}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (4,), (2, 17), (128,), ()], ids=str)
@pytest.mark.parametrize("outputs,K", [(40, 96), (65, 130), (7, 1000)])
def test_linear_decode_takes_gate_and_up_apart(outputs, K, rows, dtype, device):
    args = make(rows, outputs, K, dtype, device, swiglu=True)
    call = apart(args)
    got, want = ops.linear_decode(*call["args"], **call["kwargs"]), ops.linear_decode(*args)
    truth = reference.linear_decode(*double(args))
    factor = tolerances.factor(where(device, torch.Size(rows).numel()), dtype)
    assert_close(got, truth, reference.linear_decode(*args), factor, "y")
    torch.testing.assert_close(got, want)
    wide = reference.linear_decode(
        *double(call["args"]), up_weight=call["kwargs"]["up_weight"].double().cpu()
    )
    assert torch.equal(wide, truth)


@pytest.mark.parametrize("rows", [3, 100])
def test_linear_decode_takes_gate_and_up_as_views_of_one_weight(rows, device):
    args = make((rows,), device=device, swiglu=True)
    gate, up = args[1].chunk(2)
    want = ops.linear_decode(*args)
    got = ops.linear_decode(args[0], gate, *args[2:], up_weight=up)
    torch.testing.assert_close(got, want)
    turned = ops.linear_decode(  # the up rows below the gate rows
        args[0], up, args[2], args[3].roll(40), *args[4:], up_weight=gate
    )
    swapped = torch.cat((up, gate))
    torch.testing.assert_close(
        turned, ops.linear_decode(args[0], swapped, args[2], args[3].roll(40), *args[4:])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_decode_composite_takes_gate_and_up_apart(biased, dtype):
    args = make((2, 3), dtype=dtype, swiglu=True)
    if not biased:
        args[3] = None
    call = apart(args)
    got = _linear_decode_composite(*call["args"], **call["kwargs"])
    factor = tolerances.factor("linear_decode.matmul", dtype)
    assert_close(
        got, reference.linear_decode(*double(args)), reference.linear_decode(*args), factor, "y"
    )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 35),
    outputs=st.integers(0, 60),
    K=st.integers(1, 80),
    swiglu=st.booleans(),
)
def test_linear_decode_matches_reference_at_any_shape(rows, outputs, K, swiglu):
    args = make((rows,), outputs, K, torch.float32, swiglu=swiglu)
    check(args)
    got = ops.linear_decode(*double(args))
    torch.testing.assert_close(got, reference.linear_decode(*double(args)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_decode_rows_do_not_depend_on_each_other(dtype):
    """Up to the streamed rows, every batch size gives the same bits."""
    x, w, n, b, r, _ = make((STREAMED,), 50, 200, dtype)
    together = ops.linear_decode(x, w, n, b, r)
    for j in range(STREAMED):
        row = slice(j, j + 1)
        assert torch.equal(ops.linear_decode(x[row], w, n, b, r[row]), together[row])


@pytest.mark.parametrize("rows", [2, 64])
def test_linear_decode_reads_views_in_place(rows, device):
    x, w, n, b, r, _ = make((rows, 2), device=device)
    want = ops.linear_decode(x, w, n, b, r)
    wide_x, wide_w = (torch.full((*t.shape[:-1], 109), float("nan"), device=device) for t in (x, w))
    wide_x[..., 5:101], wide_w[:, 7:103] = x, w
    got = ops.linear_decode(wide_x[..., 5:101], wide_w[:, 7:103], n, b, r)
    torch.testing.assert_close(got, want)
    swapped = ops.linear_decode(x.transpose(0, 1), w, n, b, r.transpose(0, 1))
    torch.testing.assert_close(swapped, want.transpose(0, 1))
    torch.testing.assert_close(
        ops.linear_decode(x[:, :1].expand(-1, 5, -1), w, n, b)[:, 3],
        ops.linear_decode(x[:, 0], w, n, b),
    )


@pytest.mark.parametrize("rows", [3, 100])
def test_linear_decode_keeps_nan_in_its_row_or_column(rows, device):
    x, w, n, b, r, _ = make((rows,), device=device)
    x[1, 7] = float("nan")
    y = ops.linear_decode(x, w, n, b, r)
    others = torch.arange(rows, device=device) != 1
    assert y[1].isnan().all() and y[others].isfinite().all()
    w[5, 95] = float("inf")
    y = ops.linear_decode(x, w, n, b, r)[others]
    columns = torch.arange(40, device=device) != 5
    assert not y[:, 5].isfinite().any() and y[:, columns].isfinite().all()


def test_linear_decode_swiglu_saturates_without_nan(device):
    x = torch.ones(1, 2, device=device)
    w = torch.tensor([[-1e4, 0.0], [1e4, 0.0], [1.0, 1.0], [1.0, 1.0]], device=device)
    y = ops.linear_decode(x, w, activation="swiglu")
    torch.testing.assert_close(y, torch.tensor([[0.0, 2e4]], device=device))


@pytest.mark.parametrize("rows", [2, 100])
def test_linear_decode_passes_opcheck(rows, device):
    for swiglu in (False, True):
        torch.library.opcheck(
            torch.ops.zebra.linear_decode.default,
            (*make((rows,), device=device, swiglu=swiglu), 1e-5),
        )


def test_linear_decode_of_gate_and_up_apart_passes_opcheck(device):
    call = apart(make((2,), device=device, swiglu=True))
    torch.library.opcheck(torch.ops.zebra.linear_decode.default, call["args"], call["kwargs"])


def test_linear_decode_compiles_fullgraph(device):
    args = make((2, 3), device=device, swiglu=True)
    compiled = torch.compile(ops.linear_decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), ops.linear_decode(*args))


def test_linear_decode_carries_no_gradient(device):
    args = make(device=device)
    args[0].requires_grad_(), args[1].requires_grad_()
    assert not ops.linear_decode(*args).requires_grad
    for rows in (3, 100):  # streamed, and ATen's product
        args[0] = torch.randn(rows, 96, device=device, requires_grad=True)
        y = torch.ops.zebra.linear_decode(args[0], args[1])
        with pytest.raises(RuntimeError, match="zebra::linear_decode: it has no gradient"):
            y.sum().backward()


@pytest.mark.parametrize("rows", [5, 100])
def test_linear_decode_is_deterministic_at_any_thread_count(rows, device):
    args = make((rows,), 300, 256, torch.bfloat16, device, swiglu=True)
    first, threads = ops.linear_decode(*args), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(2):
                assert torch.equal(ops.linear_decode(*args), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_linear_decode_survives_graph_replay():
    args = make((4,), dtype=torch.bfloat16, device="cuda", swiglu=True)
    ops.linear_decode(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear_decode(*args)
    args[0].normal_()
    graph.replay()
    assert torch.equal(y, ops.linear_decode(*args))


def change(index, fn):
    return lambda a: [fn(v) if i == index else v for i, v in enumerate(a)]


REJECTED = {
    "integers": (change(0, lambda t: t.int()), "x must be float32, bfloat16 or float16"),
    "no_columns": (change(0, lambda t: t[:, :0]), r"x must be \[..., K\] with K > 0"),
    "scalar": (change(0, lambda t: t[0, 0]), r"x must be \[..., K\] with K > 0"),
    "weight_shape": (change(1, lambda t: t[:, 1:]), r"weight must be \[2 N, K\] = \[any, 96\]"),
    "weight_dtype": (change(1, torch.Tensor.half), "weight must be float32 like x"),
    "weight_rank": (
        change(1, lambda t: t[0]),
        r"weight must be \[2 N, K\] = \[any, 96\], got \[96\]",
    ),
    "odd_weight": (
        change(1, lambda t: t[1:]),
        r"weight must be \[2 N, K\]: N gate rows, then N up",
    ),
    "weight_stride": (
        change(1, lambda t: t.t().contiguous().t()),
        "weight must be contiguous in its",
    ),
    "norm_shape": (change(2, lambda t: t[1:]), r"norm_weight must be \[K\] = \[96\], got \[95\]"),
    "norm_dtype": (change(2, torch.Tensor.half), "norm_weight must be float32 like x, or float32"),
    "bias_shape": (change(3, lambda t: t[:40]), r"bias must be \[2 N\] = \[80\], got \[40\]"),
    "bias_dtype": (change(3, torch.Tensor.half), "bias must be float32 like x"),
    "residual_shape": (change(4, lambda t: t[:1]), "residual must be shaped like the result, "),
    "residual_dtype": (change(4, torch.Tensor.half), "residual must be float32 like x"),
    "activation": (
        change(5, lambda _: "gelu"),
        "activation must be 'none' or 'swiglu', got 'gelu'",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_linear_decode_rejects(case, device):
    alter, message = REJECTED[case]
    args = alter(make(swiglu=True, device=device))
    message = "zebra::linear_decode: " + message
    assert_rejected(message, ops.linear_decode, _linear_decode_composite, *args)


REJECTED_UPS = {
    "shape": (lambda t: t[1:], r"up_weight must be \[N, K\] = \[40, 96\], got \[39, 96\]"),
    "dtype": (torch.Tensor.half, "up_weight must be float32 like x"),
    "columns": (
        lambda t: t.t().contiguous().t(),
        "up_weight must be contiguous in its last dimension",
    ),
    "stride": (
        lambda t: torch.cat((t, t), 1)[:, :96],
        "up_weight must be of rows as far apart as weight's, 96, got ",
    ),
}


@pytest.mark.parametrize("case", REJECTED_UPS)
def test_linear_decode_rejects_up_weights(case, device):
    alter, message = REJECTED_UPS[case]
    call = apart(make(swiglu=True, device=device))
    message = "zebra::linear_decode: " + message
    kwargs = {"up_weight": alter(call["kwargs"]["up_weight"])}
    assert_rejected(message, ops.linear_decode, _linear_decode_composite, *call["args"], **kwargs)


def test_linear_decode_rejects_what_up_weight_excludes(device):
    call = apart(make(swiglu=True, device=device))
    args = list(call["args"])
    args[3] = args[3][:40]
    message = r"zebra::linear_decode: bias must be \[2 N\] = \[80\], got \[40\]"
    both = ops.linear_decode, _linear_decode_composite
    assert_rejected(message, *both, *args, **call["kwargs"])
    args[5] = "none"
    message = "zebra::linear_decode: up_weight must be None unless activation is 'swiglu', got "
    assert_rejected(message, *both, *args, **call["kwargs"])
