"""rms_norm against its fp64 truth, on every device."""

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_rejected

from zebra import ops
from zebra.ops import reference
from zebra.ops.norm import _rms_norm_composite
from zebra.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype, device, residual=True, weight_dtype=None):
    x = torch.randn(shape, dtype=dtype, device=device)
    w = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(weight_dtype or dtype)
    return x, w, torch.randn_like(x) if residual else None


def doubles(*tensors):
    return [None if t is None else t.detach().double().cpu() for t in tensors]


def check_forward(x, w, r, op="rms_norm"):
    got = ops.rms_norm(x, w, r)
    truth, eager = reference.rms_norm(*doubles(x, w, r)), reference.rms_norm(x, w, r)
    got = (got,) if r is None else got
    for name, g, t, e in zip(("y", "sum"), got, truth, eager, strict=False):
        assert_close(g, t, e, tolerances.factor(op, x.dtype), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 8), (3, 5, 96), (7, 4096), (2, 3, 3072), (4, 1000), (2, 40000)]
)
def test_rms_norm_matches_reference(shape, residual, dtype, device):
    check_forward(*make(shape, dtype, device, residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_takes_a_float32_weight(dtype, device):
    check_forward(*make((6, 256), dtype, device, weight_dtype=torch.float32))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 9), dim=st.integers(1, 700), residual=st.booleans())
def test_rms_norm_matches_reference_at_any_shape(rows, dim, residual):
    check_forward(*make((rows, dim), torch.float32, "cpu", residual))


def test_rms_norm_reads_views_in_place(device):
    wide = torch.randn(2, 6, 300, device=device)
    view = wide[:, :, 20:276]
    w = torch.ones(256, device=device)
    torch.testing.assert_close(ops.rms_norm(view, w), ops.rms_norm(view.contiguous(), w))
    odd = wide[:, :, 21:277]  # not 16-byte aligned
    torch.testing.assert_close(ops.rms_norm(odd, w), ops.rms_norm(odd.contiguous(), w))
    torch.testing.assert_close(
        ops.rms_norm(view.transpose(0, 1), w), ops.rms_norm(view, w).transpose(0, 1)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 8), (130, 96), (300, 7), (700, 512), (9, 4096), (5, 12288), (3, 20000), (3, 40000)],
)
def test_rms_norm_gradients_match_reference(shape, residual, dtype, device):
    check_gradients(*make(shape, dtype, device, residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(130, 96), (300, 7), (9, 4096), (5, 12288)])
def test_rms_norm_gradients_of_a_float32_weight(shape, dtype, device):
    check_gradients(*make(shape, dtype, device, residual=False, weight_dtype=torch.float32))


def check_gradients(x, w, r):
    dy, ds = torch.randn_like(x), torch.randn_like(x)

    def gradients(fn, x, w, r, dy, ds):
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, r) if t is not None]
        out = fn(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        if r is None:
            return torch.autograd.grad(out[0], leaves, dy)
        return torch.autograd.grad(out, leaves, (dy, ds))

    got = gradients(ops.rms_norm, x, w, r, dy, ds)
    truth = gradients(reference.rms_norm, *doubles(x, w, r, dy, ds))
    eager = gradients(reference.rms_norm, x, w, r, dy, ds)
    for name, g, t, e in zip(("dx", "dw", "dr"), got, truth, eager, strict=False):
        assert_close(g, t, e, tolerances.factor("rms_norm.gradient", x.dtype), name)


def test_rms_norm_passes_gradcheck():
    x, w, r = (t.requires_grad_() for t in make((3, 7), torch.float64, "cpu"))
    assert torch.autograd.gradcheck(ops.rms_norm, (x, w, r))
    assert torch.autograd.gradcheck(lambda x, w, r: ops.rms_norm(x, w, r)[1], (x, w, r))


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_passes_opcheck(residual, device):
    x, w, r = make((4, 32), torch.float32, device, residual)
    for t in (x, w, r):
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.zebra.rms_norm.default, (x, w, r, 1e-5))


def test_rms_norm_compiles_fullgraph(device):
    x, w, r = make((4, 32), torch.float32, device)
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, w, r), ops.rms_norm(x, w, r), strict=True):
        torch.testing.assert_close(got, want)


def test_rms_norm_is_deterministic(device):
    x, w, r = make((777, 512), torch.bfloat16, device)
    x.requires_grad_(), w.requires_grad_()

    def run():
        y, s = ops.rms_norm(x, w, r)
        return [y, s, *torch.autograd.grad(y.float().square().sum(), (x, w))]

    first = run()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_rms_norm_keeps_nan_in_its_row(device):
    x, w, _ = make((4, 64), torch.float32, device)
    x[2, 5] = float("nan")
    y = ops.rms_norm(x, w)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.gpu
def test_rms_norm_survives_graph_replay():
    x, w, r = make((8, 512), torch.bfloat16, "cuda")
    ops.rms_norm(x, w, r)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, s = ops.rms_norm(x, w, r)
    x.normal_()
    graph.replay()
    want_y, want_s = ops.rms_norm(x, w, r)
    assert torch.equal(y, want_y) and torch.equal(s, want_s)


REJECTED = {
    "weight_shape": (lambda x, w, r: (x, w[:5], r), r"weight must be \[D\] = \[32\], got \[5\]"),
    "weight_dtype": (lambda x, w, r: (x, w.half(), r), "weight must be float32 like x"),
    "residual_shape": (lambda x, w, r: (x, w, r[:1]), "residual must be shaped like x"),
    "residual_dtype": (lambda x, w, r: (x, w, r.half()), "residual must be float32 like x"),
    "integers": (lambda x, w, r: (x.int(), w, r), "x must be float32, bfloat16 or float16"),
    "scalar": (lambda x, w, r: (x[0, 0], w, r), "x must be at least 1-D"),
    "strided_weight": (lambda x, w, r: (x, w.repeat(2)[::2], r), "weight must be contiguous"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rms_norm_rejects(case, device):
    change, message = REJECTED[case]
    args = change(*make((4, 32), torch.float32, device))
    assert_rejected("zebra::rms_norm: " + message, ops.rms_norm, _rms_norm_composite, *args)
