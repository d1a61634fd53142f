"""The 16-bit CUDA kernels of linear_decode: each against the truth, and how they share the work.

test_linear_decode.py runs on CUDA too, with the kernel that a GPU takes by default.
"""

import pytest
import tolerances
import torch

from zebra import _extension, ops
from zebra.ops import reference
from zebra.testing import assert_close

HALF = [torch.bfloat16, torch.float16]
gpu = pytest.mark.gpu


@pytest.fixture(params=["default", "portable"])
def kernel(request, monkeypatch):
    """What this GPU takes, and what one without the Hopper kernel does: ATen's product."""
    monkeypatch.setenv("ZEBRA_PORTABLE", "1" if request.param == "portable" else "0")
    return request.param


on_both = pytest.mark.usefixtures("kernel")


def cuda(rows, outputs, K, dtype=torch.bfloat16, swiglu=False, norm_dtype=None):
    """x, weight, norm_weight, bias, residual, activation."""
    wide = 2 * outputs if swiglu else outputs

    def rand(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    return [
        rand(rows, K),
        (torch.randn(wide, K, device="cuda") / K**0.5).to(dtype),
        (1 + 0.1 * torch.randn(K, device="cuda")).to(norm_dtype or dtype),
        rand(wide),
        rand(rows, outputs),
        "swiglu" if swiglu else "none",
    ]


def compare(got, args):
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    factor = tolerances.factor("linear_decode.matmul", args[0].dtype)
    assert_close(got, reference.linear_decode(*wide), reference.linear_decode(*args), factor, "y")


def check(args):
    got = ops.linear_decode(*args)
    compare(got, args)
    return got


@gpu
@on_both
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128])
@pytest.mark.parametrize(("outputs", "K"), [(8, 64), (131, 1000), (2208, 2048), (4320, 72)])
def test_linear_decode_kernel_matches_reference(outputs, K, rows, swiglu, dtype):
    check(cuda(rows, outputs, K, dtype, swiglu))


@gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 16, 64, 128])
@pytest.mark.parametrize(("outputs", "K"), [(8, 64), (131, 1000), (14336, 72)])
def test_linear_decode_kernel_takes_gate_and_up_apart(outputs, K, rows, dtype, kernel):
    args = cuda(rows, outputs, K, dtype, swiglu=True)
    want = check(args)
    gate, up = args[1].chunk(2)

    def check_apart(first, second):
        got = ops.linear_decode(args[0], first, *args[2:], up_weight=second)
        if kernel == "default":
            assert torch.equal(got, want)
        else:  # two products of ATen's may add in another order than one
            compare(got, args)

    above, below = torch.full((2, outputs, K), float("nan"), device="cuda", dtype=dtype).unbind()
    for first, second in ((gate.clone(), up.clone()), (above.copy_(gate), below.copy_(up))):
        check_apart(first, second)
    below.copy_(gate), above.copy_(up)
    check_apart(below, above)


@gpu
@on_both
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("norm_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize(("outputs", "K"), [(40, 8), (300, 4096), (2048, 2048), (500, 6152)])
def test_linear_decode_kernel_norms(outputs, K, rows, norm_dtype, dtype):
    x, w, n, *_ = cuda(rows, outputs, K, dtype, norm_dtype=norm_dtype)
    check([x, w, n, None, None, "none"])


@gpu
@on_both
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 64, 128])
def test_linear_decode_kernel_walks_several_units(rows, swiglu):
    check(cuda(rows, 34001, 136, swiglu=swiglu))


@gpu
@on_both
@pytest.mark.parametrize("rows", [8, 32, 64, 128])
def test_linear_decode_kernel_norms_before_a_tail_along_k(rows):
    for outputs in (300, 4096, 9000):
        x, w, n, *_ = cuda(rows, outputs, 1000)
        check([x, w, n, None, None, "none"])


@gpu
@on_both
@pytest.mark.parametrize("rows", [3, 64, 100])
@pytest.mark.parametrize("kept", range(8))
def test_linear_decode_kernel_fuses_any_subset(kept, rows):
    for swiglu in (False, True):
        args = cuda(rows, 300, 520, swiglu=swiglu, norm_dtype=torch.float32)
        args[2:5] = [a if kept >> i & 1 else None for i, a in enumerate(args[2:5])]
        check(args)


@gpu
@on_both
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_linear_decode_kernel_reads_no_slack(rows):
    x, w, n, b, r, _ = cuda(rows, 300, 96)
    want = ops.linear_decode(x, w, n, b, r)
    wide_x, wide_w = (
        torch.full((t.size(0), 128), float("nan"), device="cuda").to(t) for t in (x, w)
    )
    wide_x[:, 16:112], wide_w[:, 16:112] = x, w
    assert torch.equal(ops.linear_decode(wide_x[:, 16:112], wide_w[:, 16:112], n, b, r), want)


@gpu
@on_both
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_linear_decode_kernel_takes_rows_of_any_alignment(rows):
    for K, skip in ((131, 0), (128, 1), (7, 3)):
        x, w, n, b, r, act = cuda(rows, 70, K + skip)
        check([x[:, skip:], w[:, skip:], n[skip:].clone(), b, r, act])


@gpu
@on_both
def test_linear_decode_kernel_keeps_nan_in_its_row_or_column():
    x, w, _, b, r, _ = cuda(100, 300, 512)
    x[1, 7] = float("nan")
    w[5, 95] = float("inf")
    y = ops.linear_decode(x, w, None, b, r)
    rows = torch.arange(100, device="cuda") != 1
    outputs = torch.arange(300, device="cuda") != 5
    assert y[1].isnan().all() and y[rows][:, outputs].isfinite().all()
    assert not y[rows][:, 5].isfinite().any()


@gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 128])
def test_linear_decode_kernel_chain_replays_to_the_same_bits(rows):
    """Every launch starts while the one before it runs: it must not read y too soon."""
    D, layers = 2048, 24
    weights = (torch.randn(layers, D, D, device="cuda") / D**0.5).bfloat16()
    gain = torch.ones(D, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, D, device="cuda").bfloat16()

    def chain(wait):
        y = x
        for w in weights:
            y = ops.linear_decode(y, w, gain, residual=y)
            if wait:
                torch.cuda.synchronize()
        return y

    want = chain(True)
    assert torch.equal(chain(False), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(False)
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want)


@gpu
@on_both
def test_linear_decode_sees_a_weight_written_just_before():
    x, w, n, *_ = cuda(4, 4096, 4096)
    other = torch.randn_like(w)
    torch.cuda.synchronize()
    for source in (w.clone(), other) * 4:
        w.copy_(source)
        got = ops.linear_decode(x, w, n)
        torch.cuda.synchronize()
        assert torch.equal(got, ops.linear_decode(x, w, n))


@gpu
@pytest.mark.parametrize("kept", ["nb-", "nbr", "n-r", "---", "-br"])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("rows", "outputs"), [(3, 70), (65, 70), (129, 70), (300, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_linear_decode_leaves_many_rows_and_float32_to_aten(dtype, rows, outputs, swiglu, kept):
    args = cuda(rows, outputs, 96, dtype, swiglu)
    for i, letter in enumerate(kept):
        args[2 + i] = args[2 + i] if letter != "-" else None
    check(args)
    if swiglu:
        weight = args[1]
        apart = ops.linear_decode(args[0], weight[:outputs], *args[2:], up_weight=weight[outputs:])
        assert_close(apart, ops.linear_decode(*args), ops.linear_decode(*args), 2, "apart")


def config(**problem):
    bindings = _extension.bindings()
    if bindings is None:
        pytest.skip("zebra._C was not built")
    return bindings.select_config("linear_decode_sm90", **problem)


@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("outputs", [2048, 2208, 3264, 4096, 4320, 14336, 128256])
def test_linear_decode_shares_the_weight_evenly(outputs, rows):
    """In whole boxes of 8 rows, or to the row where too few multiprocessors would have some."""
    c = config(rows=rows, outputs=outputs, K=4096)
    slots = 132 // c["cluster"]
    is_even = slots * c["units"] * c["unit"] < 1.06 * outputs
    assert is_even if c["unit"] % 8 else 4 * c["clusters"] >= 3 * slots
    assert c["smem_bytes"] <= 225 * 1024
    assert c["stages"] >= 3 or c["stages"] * c["cluster"] >= c["steps"] * c["units"]


def test_linear_decode_norms_few_rows_itself():
    for rows, K, own in ((1, 2048, True), (4, 4096, True), (5, 4096, False), (1, 8192, False)):
        c = config(rows=rows, outputs=4096, K=K, norm=True)
        assert c["norms"] is own and not config(rows=rows, outputs=4096, K=K)["norms"]
        assert c["stages"] * c["stage_bytes"] >= 64 * 1024


def test_linear_decode_has_tiles_for_its_rows_only():
    for rows in (0, 129):
        with pytest.raises(ValueError, match="1 to 128 rows"):
            config(rows=rows, outputs=64, K=64)
