"""fused_kl_div against its fp64 truth, on every device."""

import subprocess
import sys

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_rejected

from zebra import ops
from zebra.ops import kl as kl_module
from zebra.ops import reference
from zebra.ops.kl import _fused_kl_div_backward_composite, _fused_kl_div_composite
from zebra.testing import assert_close, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(M=5, V=203, Ds=24, Dt=40, dtype=torch.float32, device="cpu", logit=3.0):
    """Student and teacher hidden states and weights whose logits have a deviation of `logit`."""

    def rand(rows, width, scale):
        return (scale * torch.randn(rows, width, device=device)).to(dtype)

    return [
        rand(M, Ds, 1.0),
        rand(V, Ds, logit / Ds**0.5),
        rand(M, Dt, 1.0),
        rand(V, Dt, logit / Dt**0.5),
    ]


def double(tensors):
    return [t.detach().double().cpu() for t in tensors]


def check(args, temperature=1.0, op=ops.fused_kl_div):
    got = op(*args, temperature)
    truth = reference.fused_kl_div(*double(args), temperature)
    eager = reference.fused_kl_div(*args, temperature)
    assert got.dtype == eager.dtype and got.shape == truth.shape
    assert_close(got, truth, eager, tolerances.factor("fused_kl_div", got.dtype), "kl")
    return got


def composite(*args):
    return _fused_kl_div_composite(*args)[0]


def gradients(fn, args, temperature, dkl):
    leaves = [t.detach().clone().requires_grad_() for t in args[:2]]
    return torch.autograd.grad(fn(*leaves, *args[2:], temperature), leaves, dkl)


def composite_gradients(args, temperature, dkl):
    _, *lse = _fused_kl_div_composite(*args, temperature)
    return _fused_kl_div_backward_composite(dkl, *args, *lse, temperature)


def check_gradients(got, args, temperature, dkl, name):
    truth = gradients(reference.fused_kl_div, double(args), temperature, dkl.double().cpu())
    eager = gradients(reference.fused_kl_div, args, temperature, dkl)
    for what, g, t, e in zip(("dhidden", "dweight"), got, truth, eager, strict=True):
        assert g.dtype == e.dtype
        assert_close(g, t, e, tolerances.factor(name, g.dtype), what)


def gradient_tolerance(device):
    return "fused_kl_div.gradient" if device == "cpu" else "fused_kl_div.composite_gradient"


SHAPES = [(1, 1, 1, 1), (5, 203, 24, 40), (33, 1025, 16, 8), (20, 5000, 64, 32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_kl_div_matches_reference(shape, temperature, dtype, device):
    assert (check(make(*shape, dtype, device), temperature) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_kl_div_gradients_match_reference(shape, temperature, dtype, device):
    args = make(*shape, dtype, device)
    dkl = torch.randn(shape[0], device=device)
    got = gradients(ops.fused_kl_div, args, temperature, dkl)
    check_gradients(got, args, temperature, dkl, gradient_tolerance(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_kl_div_composite_matches_reference(dtype, monkeypatch):
    """Also where the workspace is so small that it takes several chunks and panels."""
    for budget in (kl_module._COMPOSITE_LOGIT_BYTES, 1 << 14):
        monkeypatch.setattr(kl_module, "_COMPOSITE_LOGIT_BYTES", budget)
        args = make(37, 700, dtype=dtype)
        check(args, 2.0, composite)
        dkl = torch.randn(37)
        got = composite_gradients(args, 2.0, dkl)
        check_gradients(got, args, 2.0, dkl, "fused_kl_div.composite_gradient")


@settings(max_examples=25, deadline=None)
@given(
    M=st.integers(0, 20),
    V=st.integers(1, 300),
    Ds=st.integers(1, 20),
    Dt=st.integers(1, 20),
    temperature=st.floats(0.25, 4),
)
def test_fused_kl_div_matches_reference_at_any_shape(M, V, Ds, Dt, temperature):
    args = make(M, V, Ds, Dt)
    truth = reference.fused_kl_div(*double(args), temperature)
    for op in (ops.fused_kl_div, composite):
        assert relative_error(op(*args, temperature), truth) < 3e-6


def test_fused_kl_div_crosses_panels_of_a_wide_weight():
    args = make(3, 300, 40_000, 8)  # 256 rows of the weight a panel
    dkl = torch.randn(3)
    check(args)
    got = gradients(ops.fused_kl_div, args, 1.0, dkl)
    check_gradients(got, args, 1.0, dkl, "fused_kl_div.gradient")


def test_fused_kl_div_crosses_chunks_of_tokens():
    """Beyond 256 MiB of logits: the parts, each within one chunk, give the same results."""
    tokens, cut = 140_000, 70_000
    args = make(tokens, 250, 2, 2)
    dkl = torch.rand(tokens)
    parts = [(slice(0, cut), dkl[:cut]), (slice(cut, None), dkl[cut:])]

    def run(rows, dkl):
        leaves = [args[0][rows].requires_grad_(), args[1].clone().requires_grad_()]
        kl = ops.fused_kl_div(*leaves, args[2][rows], args[3])
        return [kl.detach(), *torch.autograd.grad(kl, leaves, dkl)]

    (kl, dhidden, dweight), halves = run(slice(None), dkl), [run(*part) for part in parts]
    torch.testing.assert_close(kl, torch.cat([h[0] for h in halves]))
    torch.testing.assert_close(dhidden, torch.cat([h[1] for h in halves]))
    # fp32 sums over all tokens: roundings add up like a random walk, in the whole and the halves.
    bound = 2 * tokens**0.5 * torch.finfo(torch.float32).eps
    assert relative_error(dweight, halves[0][2].double() + halves[1][2].double()) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("asked", "kept"), [(0, None), (5, 16), (1000, 48)])
def test_fused_kl_div_gradient_does_not_depend_on_the_tokens_kept(asked, kept, dtype):
    """Of 37 tokens the forward pass keeps none, the first 16, or all; in whole tiles of 16."""
    args, dkl = make(37, 1100, dtype=dtype), torch.randn(37)
    _, *lse, dlogits = torch.ops.zebra.fused_kl_div(*args, 2.0, asked)
    assert dlogits.shape == ((1100, kept) if asked else (0,))
    got = torch.ops.zebra.fused_kl_div_backward(dkl, *args, *lse, dlogits, 2.0)
    check_gradients(got, args, 2.0, dkl, "fused_kl_div.gradient")


def test_fused_kl_div_never_holds_the_logits_of_all_tokens():
    """2000 x 40000 logits of both models are 640 MB; the workspace is 256 MiB."""
    script = """
import resource, torch
from zebra import ops
h, w = torch.randn(2000, 4), torch.randn(40000, 4)
ops.fused_kl_div(h[:1], w, h[:1], w)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
s, u = h.clone().requires_grad_(), w.clone().requires_grad_()
ops.fused_kl_div(s, u, h, w).sum().backward()
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert int(output.stdout) * 1024 < 320 << 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_kl_div_of_equal_models_is_zero(dtype, device):
    hidden, weight, _, _ = make(dtype=dtype, device=device)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    kl = ops.fused_kl_div(hidden, weight, hidden.detach(), weight.detach())
    kl.sum().backward()
    assert (kl == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("size", [1e-2, 1e-4])
@pytest.mark.parametrize("op", [ops.fused_kl_div, composite], ids=["operator", "composite"])
def test_fused_kl_div_of_nearly_equal_models_keeps_its_digits(op, size):
    """Down to 1e-8 nats, far below the fp32 rounding of the log-probabilities."""
    hidden, weight, _, _ = make(8, 500)
    args = [hidden + size * torch.randn_like(hidden), weight, hidden, weight]
    truth = reference.fused_kl_div(*double(args))
    assert truth.max() < 30 * size**2
    assert relative_error(op(*args), truth) < 1e-2 * (1e-4 / size)


@pytest.mark.parametrize("op", [ops.fused_kl_div, composite], ids=["operator", "composite"])
def test_fused_kl_div_takes_large_logits(op):
    for args in (make(logit=3e3), [t * 30 for t in make(logit=10.0)]):
        assert check(args, 1.0, op).isfinite().all()
        run = composite_gradients if op is composite else None
        dkl = torch.ones(5)
        got = run(args, 1.0, dkl) if run else gradients(op, args, 1.0, dkl)
        check_gradients(got, args, 1.0, dkl, "fused_kl_div.gradient")


def test_fused_kl_div_does_not_see_a_common_offset():
    """softmax(l + c) = softmax(l): with c = 1e4 only the rounding of the logits is lost."""
    args = make()
    shifted = list(args)
    shifted[0] = torch.cat((args[0], torch.ones(5, 1)), 1)
    shifted[1] = torch.cat((args[1], torch.full((203, 1), 1e4)), 1)
    assert relative_error(ops.fused_kl_div(*shifted), ops.fused_kl_div(*args)) < 1e-3
    dkl = torch.ones(5)
    got, want = (gradients(ops.fused_kl_div, a, 1.0, dkl)[0][:, :24] for a in (shifted, args))
    assert relative_error(got, want) < 2e-3


def test_fused_kl_div_reads_views(device):
    args = make(device=device)
    want = ops.fused_kl_div(*args)
    views = [t.t().contiguous().t() for t in args]
    torch.testing.assert_close(ops.fused_kl_div(*views), want)
    wide = [torch.full((2 * t.size(0), t.size(1) + 9), float("nan"), device=device) for t in args]
    for w, t in zip(wide, args, strict=True):
        w[::2, 4:-5] = t
    torch.testing.assert_close(ops.fused_kl_div(*(w[::2, 4:-5] for w in wide)), want)


def test_fused_kl_div_mixes_dtypes(device):
    """An fp32 student against a bf16 teacher; bf16 activations on an fp32 weight."""
    s, t = make(device=device), make(dtype=torch.bfloat16, device=device)
    for args in ([*s[:2], *t[2:]], [t[0], s[1], t[2], t[3]]):
        check(args)
        leaves = [a.detach().clone().requires_grad_() for a in args[:2]]
        ops.fused_kl_div(*leaves, *args[2:]).sum().backward()
        assert all(a.grad.dtype == a.dtype and a.grad.isfinite().all() for a in leaves)


def test_fused_kl_div_ignores_autocast():
    args = make()
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.fused_kl_div(*args)
        direct = torch.ops.zebra.fused_kl_div(*args)[0]
    assert torch.equal(got, ops.fused_kl_div(*args)) and torch.equal(direct, got)


def test_fused_kl_div_of_no_tokens(device):
    args = [t.requires_grad_() for t in make(0, device=device)]
    kl = ops.fused_kl_div(*args)
    kl.sum().backward()
    assert kl.shape == (0,) and args[0].grad.shape == (0, 24) and (args[1].grad == 0).all()


def test_fused_kl_div_differentiates_the_student_only(device):
    args = [t.requires_grad_() for t in make(device=device)]
    ops.fused_kl_div(*args).sum().backward()
    assert args[0].grad is not None and args[1].grad is not None
    assert args[2].grad is None and args[3].grad is None


def test_fused_kl_div_passes_gradcheck():
    args = double(make(3, 11, 4, 5))

    def kl(hidden, weight):
        return ops.fused_kl_div(hidden, weight, *args[2:], 1.5)

    assert torch.autograd.gradcheck(kl, [t.requires_grad_() for t in args[:2]])


def test_fused_kl_div_matches_reference_in_float64():
    for logit in (0.01, 3.0, 300.0):
        args = double(make(4, 2000, logit=logit))
        torch.testing.assert_close(
            ops.fused_kl_div(*args, 0.7), reference.fused_kl_div(*args, 0.7), rtol=1e-9, atol=1e-14
        )


def test_fused_kl_div_keeps_nan_in_its_token(device):
    args = make(device=device)
    args[0][1, 3] = float("nan")
    args[2][3, 0] = float("nan")
    leaf = args[0].requires_grad_()
    kl = ops.fused_kl_div(*args)
    kl.sum().backward()
    for t in (kl, leaf.grad.sum(-1)):
        assert t[[1, 3]].isnan().all() and t[[0, 2, 4]].isfinite().all()


def test_fused_kl_div_passes_opcheck(device):
    args = make(device=device)
    args[0].requires_grad_(), args[1].requires_grad_()
    for kept_tokens in (0, 3):
        op_args = (*args, 1.5, kept_tokens)
        torch.library.opcheck(torch.ops.zebra.fused_kl_div.default, op_args)
    args = [t.detach() for t in args]
    lse = torch.ops.zebra.fused_kl_div(*args, 1.5)[1:]
    dkl = torch.randn(5, device=device)
    torch.library.opcheck(torch.ops.zebra.fused_kl_div_backward.default, (dkl, *args, *lse, 1.5))


def test_fused_kl_div_compiles_fullgraph(device):
    args = make(device=device)
    args[0].requires_grad_()
    compiled = torch.compile(ops.fused_kl_div, fullgraph=True, backend="aot_eager")
    got, want = compiled(*args, 2.0), ops.fused_kl_div(*args, 2.0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), args[0]), torch.autograd.grad(want.sum(), args[0])
    )


def test_fused_kl_div_is_deterministic(device):
    args = make(64, 3001, dtype=torch.bfloat16, device=device)
    dkl = torch.randn(64, device=device)

    def run():
        return [ops.fused_kl_div(*args), *gradients(ops.fused_kl_div, args, 1.0, dkl)]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            for got, want in zip(run(), first, strict=True):
                if count == threads:
                    assert torch.equal(got, want)
                else:  # the sums are ours, but ATen's products may be cut by the thread count
                    assert relative_error(got, want) < 0.1 * torch.finfo(got.dtype).eps + 1e-6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_fused_kl_div_survives_graph_replay():
    args = make(8, 1000, dtype=torch.bfloat16, device="cuda")
    ops.fused_kl_div(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kl = ops.fused_kl_div(*args)
    args[0].normal_()
    graph.replay()
    assert torch.equal(kl, ops.fused_kl_div(*args))


def change(index, fn):
    return lambda a: [fn(v) if i == index else v for i, v in enumerate(a)]


REJECTED = {
    "hidden_rank": (change(0, lambda t: t[0]), r"student_hidden must be \[M, Ds\]"),
    "student_width": (
        change(1, lambda t: t[:, 1:]),
        r"student_weight must be \[V, Ds\] = \[any, 24\]",
    ),
    "tokens": (change(2, lambda t: t[1:]), r"teacher_hidden must be \[M, Dt\] = \[5, any\], got"),
    "vocabulary": (change(3, lambda t: t[1:]), r"teacher_weight must be \[V, Dt\] = \[203, 40\]"),
    "teacher_width": (change(3, lambda t: t[:, 1:]), r"teacher_weight must be \[V, Dt\] ="),
    "no_vocabulary": (lambda a: [a[0], a[1][:0], a[2], a[3][:0]], "student_weight must be .* > 0"),
    "no_width": (
        lambda a: [a[0], a[1], a[2][:, :0], a[3][:, :0]],
        r"teacher_weight must be \[V, Dt\] with Dt > 0",
    ),
    "integers": (
        change(0, lambda t: t.int()),
        "student_hidden must be float32, bfloat16 or float16",
    ),
    "float64": (change(2, lambda t: t.double()), "teacher_hidden must be float32, bfloat16 or"),
    "temperature": (lambda a: [*a, 0.0], "temperature must be positive and finite, got 0"),
    "nan": (lambda a: [*a, float("nan")], "temperature must be positive and finite, got"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_fused_kl_div_rejects(case, device):
    alter, message = REJECTED[case]
    args = alter(make(device=device))
    assert_rejected(
        "zebra::fused_kl_div: " + message, ops.fused_kl_div, _fused_kl_div_composite, *args
    )


def test_fused_kl_div_rejects_float64_beside_other_dtypes_on_the_cpu():
    args = [make()[0].double(), *make()[1:]]
    message = "zebra::fused_kl_div: student_weight must be float64 like student_hidden, got"
    assert_rejected(message, ops.fused_kl_div, _fused_kl_div_composite, *args)


def test_fused_kl_div_rejects_a_negative_number_of_tokens_to_keep():
    message = "zebra::fused_kl_div: kept_tokens must be 0 or more, got -1"
    op = torch.ops.zebra.fused_kl_div
    assert_rejected(message, op, _fused_kl_div_composite, *make(), 1.0, -1)
