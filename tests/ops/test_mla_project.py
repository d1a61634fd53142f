"""mla_project, its gradients and its cache write against their fp64 truth, on every device."""

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_project_cases import DIMS, make, rejected, wide
from refusals import assert_rejected

from zebra import ops
from zebra.ops import reference
from zebra.ops.project import (
    _mla_project_backward_composite,
    _mla_project_composite,
    _mla_project_training_composite,
)
from zebra.testing import assert_close, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENTS = (
    "hidden",
    "q_a_weight",
    "q_b_weight",
    "kv_a_weight",
    "q_a_norm_weight",
    "kv_a_norm_weight",
)


def run(fn, args, dq, dlatent):
    """q, latent, and the gradients of what is given of GRADIENTS."""
    args = dict(args)
    leaves = [k for k in GRADIENTS if args[k] is not None]
    for k in leaves:
        args[k] = args[k].detach().requires_grad_()
    q, latent = fn(**args)
    grads = torch.autograd.grad(
        (q, latent), [args[k] for k in leaves], (dq.to(q), dlatent.to(latent))
    )
    return {"q": q, "latent": latent} | dict(zip(leaves, grads, strict=True))


def output_gradients(args):
    q, latent = reference.mla_project(**args)
    return torch.randn_like(q), torch.randn_like(latent)


def compare(got, truth, eager, dtype):
    assert got.keys() == truth.keys()
    for name, g in got.items():
        assert g.shape == truth[name].shape and g.dtype == eager[name].dtype
        op = "mla_project" if name in ("q", "latent") else "mla_project.gradient"
        assert_close(g, truth[name], eager[name], tolerances.factor(op, dtype), name)


def check(args, dtype):
    grads = output_gradients(args)
    truth = run(reference.mla_project, wide(args), *(g.double().cpu() for g in grads))
    eager = run(reference.mla_project, args, *grads)
    compare(run(ops.mla_project, args, *grads), truth, eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_mla_project_and_gradients_match_reference(dims, norms, dtype, device):
    check(make(dims, dtype, device, norms=norms), dtype)


@pytest.mark.parametrize("norms", [False, True])
def test_mla_project_without_a_query_bottleneck_matches_reference(norms, device):
    check(make(DIMS["odd"], torch.float32, device, q_a=False, norms=norms), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mla_project_takes_float32_norm_weights(dtype, device):
    args = make(DIMS["odd"], dtype, device, norms=True, norm_dtype=torch.float32)
    q, latent = ops.mla_project(**args)
    assert q.dtype == latent.dtype == dtype
    want = reference.mla_project(**wide(args))
    assert relative_error(q, want[0]) < 4 * torch.finfo(dtype).eps
    assert relative_error(latent, want[1]) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_a", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_mla_project_composite_matches_reference(norms, q_a, dtype):
    args = make(DIMS["odd"], dtype, "cpu", q_a=q_a, norms=norms)
    grads = output_gradients(args)
    truth = run(reference.mla_project, wide(args), *(g.double() for g in grads))
    eager = run(reference.mla_project, args, *grads)
    q, latent = _mla_project_composite(**args)
    for kept in (False, True) if q_a else (False,):
        c_q = None
        if kept:
            *again, c_q = _mla_project_training_composite(*args.values(), 1e-6)
            assert all(torch.equal(a, b) for a, b in zip(again, (q, latent), strict=True))
        gradients = _mla_project_backward_composite(*grads, **args, norm_eps=1e-6, c_q=c_q)
        named = {k: g for k, g in zip(GRADIENTS, gradients, strict=True) if args[k] is not None}
        compare({"q": q, "latent": latent} | named, truth, eager, dtype)


@settings(max_examples=30, deadline=None)
@given(
    D=st.integers(1, 40),
    Rq=st.integers(1, 40),
    H=st.integers(1, 5),
    Dn=st.integers(1, 12),
    half=st.integers(0, 8),
    R=st.integers(1, 40),
    B=st.integers(0, 3),
    T=st.integers(0, 4),
    norms=st.booleans(),
)
def test_mla_project_matches_reference_at_any_shape(D, Rq, H, Dn, half, R, B, T, norms):
    args = make((D, Rq, H, Dn, 2 * half, R), torch.float32, "cpu", (B, T), norms=norms)
    args["hidden"] = args["hidden"] + 0.5  # with D = 1 a norm of almost nothing amplifies rounding
    for got, want in zip(ops.mla_project(**args), reference.mla_project(**wide(args)), strict=True):
        assert got.shape == want.shape and relative_error(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_mla_project_accepts_both_position_dtypes(dtype, device):
    args = make(DIMS["odd"], torch.float32, device)
    want = ops.mla_project(**args)
    got = ops.mla_project(**args | {"positions": args["positions"].to(dtype)})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_mla_project_reads_strided_inputs(device):
    args = make(DIMS["odd"], torch.float32, device)
    want = ops.mla_project(**args)
    hidden = args["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    positions = torch.stack((args["positions"], args["positions"] * 0), -1)[..., 0]
    weight = args["q_b_weight"].t().contiguous().t()
    assert not (hidden.is_contiguous() or positions.is_contiguous() or weight.is_contiguous())
    changed = {"hidden": hidden, "positions": positions, "q_b_weight": weight}
    for a, b in zip(ops.mla_project(**args | changed), want, strict=True):
        assert relative_error(a, b) < 1e-6


def test_mla_project_rotation_keeps_scores_under_a_shift_of_positions(device):
    dims = (64, 48, 4, 8, 16, 24)
    args = make(dims, torch.float32, device, (1, 6), maxpos=600)
    angle = torch.arange(600.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(8.0) / 8)
    args["cos"], args["sin"] = angle.cos().float().to(device), angle.sin().float().to(device)
    scores = []
    for shift in (0, 500):
        args["positions"] = torch.arange(shift, shift + 6, device=device)[None]
        q, latent = ops.mla_project(**args)
        scores.append(torch.einsum("bthe,bse->bths", q[..., 8:], latent[..., 24:]))
    assert relative_error(scores[1], scores[0]) < 1e-5


def test_mla_project_merged_query_weight_equals_two_steps(device):
    args = make(DIMS["odd"], torch.float32, device)
    merged = args["q_b_weight"] @ args["q_a_weight"]
    got = ops.mla_project(**args | {"q_a_weight": None, "q_b_weight": merged})
    for a, b in zip(got, ops.mla_project(**args), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("fn", [ops.mla_project, torch.ops.zebra.mla_project], ids=["ops", "raw"])
@pytest.mark.parametrize("q_a", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_mla_project_passes_gradcheck(norms, q_a, fn):
    args = make((6, 5, 2, 3, 4, 3), torch.float64, "cpu", (2, 3), q_a, norms)
    names = [k for k in GRADIENTS if args[k] is not None]

    def project(*leaves):
        return fn(**args | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(project, [args[k].requires_grad_() for k in names])


def test_mla_project_gradient_of_one_output_alone(device):
    args = make(DIMS["odd"], torch.float32, device)
    dq, dlatent = output_gradients(args)
    x = args["hidden"].requires_grad_()
    q, latent = ops.mla_project(**args)
    for out, grad, both in ((q, dq, (dq, 0 * dlatent)), (latent, dlatent, (0 * dq, dlatent))):
        got = torch.autograd.grad(out, x, grad, retain_graph=True)[0]
        want = run(reference.mla_project, wide(args), *(g.double().cpu() for g in both))["hidden"]
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("norms", [False, True])
def test_mla_project_passes_opcheck(norms, device):
    args = make(DIMS["odd"], torch.float32, device, norms=norms)
    for k in GRADIENTS:
        if args[k] is not None:
            args[k].requires_grad_()
    torch.library.opcheck(torch.ops.zebra.mla_project.default, (), args)
    torch.library.opcheck(torch.ops.zebra.mla_project_training.default, (*args.values(), 1e-6))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mla_project_has_the_same_gradients_whether_c_q_is_kept_or_not(dtype, norms, device):
    args = make(DIMS["8b_heads"], dtype, device, norms=norms)
    grads = output_gradients(args)
    kept, again = (run(f, args, *grads) for f in (ops.mla_project, torch.ops.zebra.mla_project))
    assert all(torch.equal(kept[k], again[k]) for k in again)


def test_mla_project_keeps_c_q_only_where_a_gradient_follows(device):
    args = make(DIMS["odd"], torch.float32, device)

    def saved():
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            q, _ = ops.mla_project(**args)
        return q.requires_grad, shapes

    assert saved() == (False, [])
    args["kv_a_weight"].requires_grad_()
    needs_grad, shapes = saved()
    assert needs_grad and (2, 5, 17) in shapes
    with torch.no_grad():
        assert saved() == (False, [])


def test_mla_project_backward_rejects_a_wrong_c_q(device):
    args = make(DIMS["odd"], torch.float32, device)
    dq, dlatent = output_gradients(args)
    c_q = torch.zeros(2, 5, 17, device=device)

    def backward(c_q, **changes):
        values = (args | changes).values()
        return torch.ops.zebra.mla_project_backward(dq, dlatent, *values, 1e-6, c_q)

    for bad, message in (
        (c_q[:1], r"c_q must be \[B, T, Rq\] = \[2, 5, 17\], got \[1, 5, 17\]"),
        (c_q.half(), "c_q must be float32 like hidden"),
    ):
        with pytest.raises(RuntimeError, match="zebra::mla_project_backward: " + message):
            backward(bad)
    merged = args["q_b_weight"] @ args["q_a_weight"]
    with pytest.raises(RuntimeError, match="c_q must be None without q_a_weight"):
        backward(c_q, q_a_weight=None, q_b_weight=merged)


def test_mla_project_compiles_fullgraph(device):
    args = make(DIMS["odd"], torch.float32, device, norms=True)
    grads = output_gradients(args)
    compiled = torch.compile(ops.mla_project, fullgraph=True, backend="aot_eager")
    got, want = (run(fn, args, *grads) for fn in (compiled, ops.mla_project))
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_mla_project_is_deterministic(device):
    args = make(DIMS["8b_heads"], torch.bfloat16, device, norms=True)
    grads = output_gradients(args)
    first = run(ops.mla_project, args, *grads)
    for _ in range(3):
        again = run(ops.mla_project, args, *grads)
        assert all(torch.equal(again[k], first[k]) for k in first)


def test_mla_project_keeps_nan_in_its_token(device):
    args = make(DIMS["odd"], torch.float32, device, norms=True)
    args["hidden"][1, 2, 3] = float("nan")
    for out in ops.mla_project(**args):
        assert out[1, 2].isnan().all()
        assert out[0].isfinite().all() and out[1, [0, 1, 3, 4]].isfinite().all()


REJECTED = {
    "hidden_rank": ({"hidden": lambda t: t[0]}, r"hidden must be \[B, T, D\] with D >= 1"),
    "hidden_dtype": ({"hidden": lambda t: t.int()}, "hidden must be float32, bfloat16 or float16"),
    "q_a_columns": (
        {"q_a_weight": lambda t: t[:, 1:]},
        r"q_a_weight must be \[Rq, D\] = \[any, 33\], got \[17, 32\]",
    ),
    "q_b_columns": (
        {"q_b_weight": lambda t: t[:, 1:]},
        r"q_b_weight must be \[H \* \(Dn \+ E\), Rq\] = \[any, 17\]",
    ),
    "q_b_without_q_a": (
        {"q_a_weight": lambda t: None},
        r"q_b_weight must be \[H \* \(Dn \+ E\), D\] = \[any, 33\]",
    ),
    "kv_a_dtype": ({"kv_a_weight": lambda t: t.half()}, "kv_a_weight must be float32 like hidden"),
    "kv_a_rows": (
        {"kv_a_weight": lambda t: t[:6]},
        r"kv_a_weight must be \[R \+ E, D\] with more rows than E = 6",
    ),
    "cos_dtype": ({"cos": lambda t: t.half()}, r"cos must be float32, got \[64, 3\] float16"),
    "sin_shape": (
        {"sin": lambda t: t[1:]},
        r"sin must be \[maxpos, E / 2\] = \[64, 3\], got \[63, 3\]",
    ),
    "heads": ({"num_heads": lambda n: 4}, "num_heads must be a divisor of .* 33, got 4"),
    "narrow_heads": (
        {"num_heads": lambda n: 33},
        r"q_b_weight must be \[H \* \(Dn \+ E\), Rq\] with H = 33 and Dn \+ E >= E = 6",
    ),
    "positions_dtype": ({"positions": lambda t: t.float()}, "positions must be int32 or int64"),
    "positions_shape": (
        {"positions": lambda t: t[:1]},
        r"positions must be \[B, T\] = \[2, 5\], got \[1, 5\]",
    ),
    "norm_shape": (
        {"q_a_norm_weight": lambda t: t[1:]},
        r"q_a_norm_weight must be \[Rq\] = \[17\], got \[16\]",
    ),
    "norm_dtype": (
        {"kv_a_norm_weight": lambda t: t.half()},
        "kv_a_norm_weight must be float32 like hidden, or float32",
    ),
}
REJECTED_ON_CPU = {
    "position_high": (
        {"positions": lambda t: t * 0 + 64},
        r"positions must be 0 to maxpos - 1 = 63, got 64 at \[0, 0\]",
    ),
    "position_low": (
        {"positions": lambda t: t.int() * 0 - 1},
        r"positions must be 0 to maxpos - 1 = 63, got -1 at \[0, 0\]",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_mla_project_rejects(case, device):
    changes, message = REJECTED[case]
    args = rejected(make(DIMS["odd"], torch.float32, device, norms=True), changes)
    message = "zebra::mla_project: " + message
    assert_rejected(message, ops.mla_project, _mla_project_composite, **args)


@pytest.mark.parametrize("case", REJECTED_ON_CPU)
def test_mla_project_rejects_positions_out_of_range_on_the_cpu(case):
    changes, message = REJECTED_ON_CPU[case]
    args = rejected(make(DIMS["odd"], torch.float32, "cpu"), changes)
    with pytest.raises(RuntimeError, match="zebra::mla_project: " + message):
        ops.mla_project(**args)
