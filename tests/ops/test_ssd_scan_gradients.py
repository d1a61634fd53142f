"""ssd_scan, backward: every gradient against fp64 autograd; the composite; dispatcher contracts."""

import hashlib
from itertools import pairwise

import pytest
import tolerances
import torch
from ssd_cases import DTYPES, NAMES, doubles, gradients, make

from zebra import ops
from zebra.ops import reference, ssd
from zebra.testing import assert_close, relative_error

PACKED = [0, 0, 3, 64, 64, 65, 130, 195, 200, 200]
OPTIONAL = ["D", "z", "dt_bias", "norm_weight", "initial_state"]


def cotangents(args):
    y, state = ops.ssd_scan(**args)
    return torch.randn_like(y), torch.randn_like(state)


def wide(t):
    return None if t is None else t.double().cpu()


def check(args, dy, dstate, **options):
    def scan(fn):
        return lambda **a: fn(**a, **options)

    got = gradients(scan(ops.ssd_scan), args, dy, dstate)
    truth = gradients(scan(reference.ssd_scan), doubles(args), wide(dy), wide(dstate))
    eager = gradients(scan(reference.ssd_scan), args, dy, dstate)
    for name, g in got.items():
        assert g.shape == args[name].shape and g.dtype == args[name].dtype
        factor = tolerances.factor("ssd_scan.gradient", g.dtype)
        assert_close(g, truth[name], eager[name], factor, "d" + name)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "H", "P", "N", "groups"),
    [
        (2, 70, 4, 8, 16, (2, 2, 4)),  # Zebra: x and B at KV-head width
        (1, 130, 6, 32, 32, (2, 2, 6)),  # three query heads a KV head
        (1, 65, 16, 16, 32, (16, 1, 1)),  # Mamba-2: partial sums over two blocks of heads
        (2, 33, 6, 5, 7, (1, 2, 3)),  # three different ratios, odd sizes
        (1, 1, 2, 8, 8, (1, 2, 1)),
        (1, 64, 2, 64, 64, (1, 1, 2)),
    ],
)
def test_ssd_scan_gradients_match_reference(batch, tokens, H, P, N, groups, dtype, device):
    args = make(batch, tokens, H, P, N, groups, dtype, device)
    check(args, *cotangents(args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ssd_scan_gradients_match_reference_on_packed_sequences(dtype, device):
    args = make(1, 200, 6, 16, 8, (2, 2, 6), dtype, device, cu=PACKED)
    check(args, *cotangents(args))


@pytest.mark.parametrize("used", ["y", "final_state"])
def test_ssd_scan_gradients_flow_from_one_output_alone(used, device):
    args = make(device=device)
    dy, dstate = cotangents(args)
    if used == "y":
        check(args, dy, None)
        return
    # Through the state alone, C, D, z and norm_weight get zeros; autograd on the truth refuses.
    truth = gradients(reference.ssd_scan, doubles(args), wide(torch.zeros_like(dy)), wide(dstate))
    for name, g in gradients(ops.ssd_scan, args, None, dstate).items():
        assert relative_error(g, truth[name]) < 1e-5, name


@pytest.mark.parametrize("absent", [*OPTIONAL, "all"])
def test_ssd_scan_gradients_take_every_optional_argument_or_not(absent, device):
    args = make(device=device, without=OPTIONAL if absent == "all" else [absent])
    got = check(args, *cotangents(args))
    assert set(got) == {k for k in NAMES if args[k] is not None}


def test_ssd_scan_gradients_match_reference_without_softplus(device):
    args = make(device=device)
    args["dt"] = args["dt"].abs() * 0.1
    args["dt_bias"] = args["dt_bias"].exp()
    check(args, *cotangents(args), dt_softplus=False)


@pytest.mark.parametrize("A", [-0.0, -1e-6, -1e3])
def test_ssd_scan_gradients_match_reference_at_extreme_decay(A, device):
    args = make(tokens=130, device=device)
    args["A"] = torch.full_like(args["A"], A)
    check(args, *cotangents(args))


def test_ssd_scan_gradients_are_finite_after_huge_steps(device):
    args = make(tokens=130, device=device, without=["dt_bias"])
    args["dt"] = torch.where(torch.arange(130, device=device)[:, None] % 2 == 0, 1e3, -8.0)
    args["dt"] = args["dt"].expand(2, 130, 4).contiguous()
    got = gradients(ops.ssd_scan, args, *cotangents(args))
    assert all(g.isfinite().all() for g in got.values())


def test_ssd_scan_gradients_of_two_parts_equal_the_whole(device):
    args = make(tokens=100, device=device)
    dy, dstate = cotangents(args)
    time = ("x", "dt", "B", "C", "z")

    def parts(**a):
        first = {k: v[:, :37] if k in time else v for k, v in a.items()}
        y1, middle = ops.ssd_scan(**first)
        second = {k: v[:, 37:] if k in time else v for k, v in a.items()}
        y2, last = ops.ssd_scan(**{**second, "initial_state": middle})
        return torch.cat((y1, y2), 1), last

    got, want = (gradients(fn, args, dy, dstate) for fn in (parts, ops.ssd_scan))
    for name in want:
        assert relative_error(got[name], want[name]) < 2e-5, name


def test_ssd_scan_gradients_of_packed_sequences_equal_separate_ones():
    args = make(1, 200, 6, 16, 8, (2, 2, 6), cu=PACKED)
    dy, dstate = cotangents(args)
    got = gradients(ops.ssd_scan, args, dy, dstate)
    for i, (first, end) in enumerate(pairwise(PACKED)):
        one = dict(args, cu_seqlens=None, initial_state=args["initial_state"][i : i + 1])
        time = ("x", "dt", "B", "C", "z")
        one.update({k: one[k][:, first:end] for k in time})
        want = gradients(ops.ssd_scan, one, dy[:, first:end], dstate[i : i + 1])
        assert torch.equal(got["initial_state"][i : i + 1], want["initial_state"])
        assert all(torch.equal(got[k][:, first:end], want[k]) for k in time)


def test_ssd_scan_gradients_of_shared_heads_are_sums_of_expanded_ones(device):
    args = make(1, 90, 6, 16, 8, (2, 3, 1), device=device)
    dy, dstate = cotangents(args)
    shared = ("x", "B", "C")
    wide = {k: args[k].repeat_interleave(6 // args[k].size(2), dim=2) for k in shared}
    got = gradients(ops.ssd_scan, args, dy, dstate)
    want = gradients(ops.ssd_scan, {**args, **wide}, dy, dstate)
    for k in shared:
        want[k] = want[k].unflatten(2, (args[k].size(2), -1)).sum(3)
    for k in want:
        assert relative_error(got[k], want[k]) < 1e-5, k


def test_ssd_scan_gradients_take_strided_and_expanded_cotangents(device):
    args = make(device=device)
    dy = (
        torch.randn(4, 70, 1, device=device).transpose(0, 1).expand(2, 70, 4, 1).expand(2, 70, 4, 8)
    )
    dstate = torch.randn(2, 4, 8, 8, device=device).mT
    got = gradients(ops.ssd_scan, args, dy, dstate)
    want = gradients(ops.ssd_scan, args, dy.contiguous(), dstate.contiguous())
    for k in want:  # the composite's products may take another order for other strides
        exact = {} if device == "cuda" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got[k], want[k], **exact)


def test_ssd_scan_gradients_keep_nan_in_their_sequence():
    args = make(1, 170, cu=[0, 70, 90, 93, 170])
    dy, dstate = cotangents(args)
    clean = gradients(ops.ssd_scan, args, dy, dstate)
    args["x"][0, 91] = float("nan")
    got = gradients(ops.ssd_scan, args, dy, dstate)
    others = torch.ones(170, dtype=torch.bool)
    others[90:93] = False
    for k in ("x", "dt", "B", "C", "z"):
        assert torch.equal(got[k][:, others], clean[k][:, others]), k
    keep = [0, 1, 3]
    assert torch.equal(got["initial_state"][keep], clean["initial_state"][keep])


def test_ssd_scan_passes_gradcheck():
    for cu in (None, [0, 3, 3, 5]):
        batch = 2 if cu is None else 1
        args = make(batch, 5, 2, 3, 2, (2, 1, 1), torch.float64, cu=cu)
        tensors = [args[k].requires_grad_() for k in NAMES]
        assert torch.autograd.gradcheck(
            lambda *t, cu=args["cu_seqlens"]: ops.ssd_scan(*t, cu_seqlens=cu), tensors
        )


@pytest.mark.parametrize("cu", [None, [0, 9, 9, 70]])
@pytest.mark.parametrize("without", [[], OPTIONAL])
def test_ssd_scan_passes_opcheck(cu, without, device):
    args = make(1, 70, device=device, cu=cu, without=without)
    for k in NAMES:
        if args[k] is not None:
            args[k].requires_grad_()
    torch.library.opcheck(torch.ops.zebra.ssd_scan.default, (*args.values(), True, 1e-5))
    dy, dstate = cotangents(args)
    tensors = [None if t is None else t.detach() for t in args.values()]
    torch.library.opcheck(
        torch.ops.zebra.ssd_scan_backward.default,
        (dy.detach(), dstate.detach(), *tensors, True, 1e-5),
    )


def test_ssd_scan_compiles_fullgraph(device):
    args = make(device=device)
    compiled = torch.compile(ops.ssd_scan, fullgraph=True, backend="aot_eager")
    dy, dstate = cotangents(args)
    for got, want in zip(compiled(**args), ops.ssd_scan(**args), strict=True):
        torch.testing.assert_close(got, want)
    got, want = (gradients(fn, args, dy, dstate) for fn in (compiled, ops.ssd_scan))
    for k in want:
        torch.testing.assert_close(got[k], want[k])


def test_ssd_scan_gradients_are_deterministic(device):
    args = make(2, 130, 16, 32, 16, (4, 4, 1), torch.bfloat16, device)
    dy, dstate = cotangents(args)

    def digest():
        grads = gradients(ops.ssd_scan, args, dy, dstate).values()
        return hashlib.sha256(b"".join(g.float().cpu().numpy().tobytes() for g in grads))

    assert len({digest().hexdigest() for _ in range(5)}) == 1


def test_ssd_scan_gradients_do_not_depend_on_the_number_of_threads():
    args = make(3, 130, 16, 32, 16, (4, 4, 1))
    dy, dstate = cotangents(args)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(gradients(ops.ssd_scan, args, dy, dstate))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[k], results[0][k]) for k in other)


@pytest.mark.gpu
def test_ssd_scan_gradients_survive_graph_replay():
    args = make(1, 200, dtype=torch.bfloat16, device="cuda", cu=PACKED)
    dy, dstate = cotangents(args)
    tensors = (dy, dstate, *args.values(), True, 1e-5)
    torch.ops.zebra.ssd_scan_backward(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.ops.zebra.ssd_scan_backward(*tensors)
    args["x"].normal_()
    args["cu_seqlens"].copy_(torch.tensor([0, 7, 7, 80, 81, 99, 150, 150, 151, 200]))
    graph.replay()
    for g, w in zip(got, torch.ops.zebra.ssd_scan_backward(*tensors), strict=True):
        torch.testing.assert_close(g, w)


# The composite, which serves CUDA tensors, as an operator of the CPU.


@pytest.fixture(scope="module")
def composite():
    """torch.ops.zebra_test.ssd_scan: the schemas and gradients of zebra, composites as kernels."""
    library = torch.library.Library("zebra_test", "FRAGMENT")
    kernels = dict(
        ssd_scan=ssd._ssd_scan_composite, ssd_scan_backward=ssd._ssd_scan_backward_composite
    )
    for name, fn in kernels.items():
        schema = str(getattr(torch.ops.zebra, name).default._schema)
        library.define(schema.removeprefix("zebra::"))
        library.impl(name, fn, "CPU")

    def backward(ctx, *grads):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops, "zebra", torch.ops.zebra_test)
            return ssd._backward(ctx, *grads)

    torch.library.register_autograd(
        "zebra_test::ssd_scan", backward, setup_context=ssd._setup, lib=library
    )
    yield lambda **args: torch.ops.zebra_test.ssd_scan(*args.values())
    library._destroy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cu", [None, PACKED, [0, 200], [*range(70), 200]], ids=["batch", "packed", "one", "short"]
)
@pytest.mark.parametrize("without", [[], OPTIONAL], ids=["all", "bare"])
def test_ssd_scan_composite_matches_reference(cu, without, dtype, composite):
    args = make(1 if cu else 2, 200, 6, 5, 8, (2, 3, 6), dtype, cu=cu, without=without)
    dy, dstate = cotangents(args)
    eager = reference.ssd_scan(**args)
    truth = reference.ssd_scan(**doubles(args))
    for g, t, e in zip(composite(**args), truth, eager, strict=True):
        assert_close(g, t, e, tolerances.factor("ssd_scan", g.dtype), "output")
    got = gradients(composite, args, dy, dstate)
    truth = gradients(reference.ssd_scan, doubles(args), wide(dy), wide(dstate))
    eager = gradients(reference.ssd_scan, args, dy, dstate)
    for k in got:
        factor = tolerances.factor("ssd_scan.gradient", got[k].dtype)
        assert_close(got[k], truth[k], eager[k], factor, "d" + k)


def test_ssd_scan_composite_keeps_nan_in_its_sequence(composite):
    args = make(1, 170, cu=[0, 70, 90, 93, 170])
    y, state = composite(**args)
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    clean = gradients(composite, args, dy, dstate)
    args["x"][0, 91] = float("nan")
    args["B"][0, 92] = float("inf")
    got_y, got_state = composite(**args)
    got = gradients(composite, args, dy, dstate)
    others = torch.ones(170, dtype=torch.bool)
    others[90:93] = False
    assert torch.equal(got_y[:, others], y[:, others])
    assert torch.equal(got_state[[0, 1, 3]], state[[0, 1, 3]])
    for k in ("x", "dt", "B", "C", "z"):
        torch.testing.assert_close(got[k][:, others], clean[k][:, others])


def test_ssd_scan_composite_takes_no_tokens(composite):
    for cu in (None, [0], [0, 0, 0]):
        args = make(1, 0, cu=cu)
        y, state = composite(**args)
        assert y.shape == (1, 0, 4, 8) and torch.equal(state, args["initial_state"])
