"""mla_attention and its gradients against their fp64 truth, on every device."""

from itertools import pairwise

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_rejected

from zebra import ops
from zebra.ops import reference
from zebra.ops.attention import _mla_attention_backward_composite, _mla_attention_composite
from zebra.testing import assert_close, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# H, G, Dn, E, Dv
DIMS = {
    "1b": (32, 8, 32, 32, 64),
    "3b": (24, 8, 64, 64, 128),
    "one_head": (1, 1, 8, 0, 8),
    "no_groups": (3, 3, 16, 32, 8),
    "group_of_eight": (24, 3, 7, 2, 5),
    "no_nope": (4, 2, 0, 64, 16),
}


def make(dims, B, T, dtype, device, S=None):
    """q, kv, k_rope and output gradients."""
    H, G, Dn, E, Dv = dims
    S = T if S is None else S

    def randn(*shape):
        return torch.randn(shape).to(dtype).to(device)

    inputs = randn(B, T, H, Dn + E), randn(B, S, G, Dn + Dv), randn(B, S, E)
    return inputs, (randn(B, T, H, Dv), torch.randn(B, T, H).to(device))


def run(fn, inputs, grads, cu_seqlens=None, causal=True, scale=0.3):
    """[o, lse, dq, dkv, dk_rope]."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    o, lse = fn(*leaves, scale, cu_seqlens, causal)
    grads = [g.to(out.dtype) for g, out in zip(grads, (o, lse), strict=True)]
    return [o, lse, *torch.autograd.grad((o, lse), leaves, grads)]


def composite(inputs, grads, cu_seqlens=None, causal=True, scale=0.3):
    o, lse = _mla_attention_composite(*inputs, scale, cu_seqlens, causal)
    do, dlse = (g.to(out.dtype) for g, out in zip(grads, (o, lse), strict=True))
    return [
        o,
        lse,
        *_mla_attention_backward_composite(do, dlse, *inputs, o, lse, scale, cu_seqlens, causal),
    ]


def check(inputs, grads, cu_seqlens=None, causal=True, got=None):
    doubles = [[t.double().cpu() for t in ts] for ts in (inputs, grads)]
    cpu_cu = None if cu_seqlens is None else cu_seqlens.cpu()
    truth = run(reference.mla_attention, *doubles, cpu_cu, causal)
    eager = run(reference.mla_attention, inputs, grads, cu_seqlens, causal)
    got = run(ops.mla_attention, inputs, grads, cu_seqlens, causal) if got is None else got
    for name, g, t, e in zip(("o", "lse", "dq", "dkv", "dk_rope"), got, truth, eager, strict=True):
        assert g.shape == t.shape and g.dtype == e.dtype
        op = "mla_attention.library" if got[0].is_cuda and got[0].itemsize == 2 else "mla_attention"
        op += ".gradient" if name.startswith("d") else ""
        assert_close(g, t, e, tolerances.factor(op, g.dtype), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_mla_attention_and_gradients_match_reference(dims, causal, dtype, device):
    check(*make(dims, 2, 37, dtype, device), causal=causal)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("prefix", [0, 1, 70])
def test_mla_attention_matches_reference_after_a_prefix(T, prefix, device):
    check(*make(DIMS["no_groups"], 2, T, torch.float32, device, T + prefix))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_mla_attention_of_packed_sequences_matches_reference(causal, dtype, device):
    cu = torch.tensor([0, 1, 40, 40, 105, 130], dtype=torch.int32, device=device)
    check(*make(DIMS["group_of_eight"], 1, 130, dtype, device), cu, causal)


def test_mla_attention_of_packed_sequences_equals_separate_calls(device):
    inputs, grads = make(DIMS["1b"], 1, 150, torch.bfloat16, device)
    bounds = [0, 33, 90, 150]
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    packed = run(ops.mla_attention, inputs, grads, cu)
    # On CUDA two libraries: each result differs from the other's by its own roundings.
    tolerance = 1e-3 if device == "cpu" else 6e-3
    for a, b in pairwise(bounds):
        one = run(ops.mla_attention, [t[:, a:b] for t in inputs], [t[:, a:b] for t in grads])
        for p, o in zip(packed, one, strict=True):
            assert relative_error(p[:, a:b], o) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_mla_attention_composite_matches_reference(packed, causal, dtype, monkeypatch):
    B, T, S = (1, 70, 70) if packed else (2, 40, 70)
    inputs, grads = make(DIMS["no_groups"], B, T, dtype, "cpu", S)
    cu = torch.tensor([0, 5, 5, 70], dtype=torch.int32) if packed else None
    check(inputs, grads, cu, causal, composite(inputs, grads, cu, causal))
    monkeypatch.setattr("zebra.ops.attention._CHUNK_ELEMENTS", 3 * B * S * 17)  # chunks of 17
    check(inputs, grads, cu, causal, composite(inputs, grads, cu, causal))


@settings(max_examples=30, deadline=None)
@given(
    group=st.integers(1, 9),
    G=st.integers(1, 4),
    Dn=st.integers(4, 20),
    half=st.integers(0, 12),
    Dv=st.integers(4, 20),
    B=st.integers(0, 2),
    T=st.integers(1, 80),
    prefix=st.integers(0, 80),
    causal=st.booleans(),
)
def test_mla_attention_matches_reference_at_any_shape(group, G, Dn, half, Dv, B, T, prefix, causal):
    dims = (group * G, G, Dn, 2 * half, Dv)
    if B == 0:  # the reference has no rows to stack
        (q, kv, k_rope), _ = make(dims, 0, T, torch.float32, "cpu", T + prefix)
        o, lse = ops.mla_attention(q, kv, k_rope, 1.0, None, causal)
        assert o.shape == (0, T, group * G, Dv) and lse.shape == (0, T, group * G)
        return
    check(*make(dims, B, T, torch.float32, "cpu", T + prefix), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_mla_attention_accepts_no_queries(causal, device):
    inputs, grads = make(DIMS["1b"], 2, 0, torch.float32, device, S=5)
    o, lse, dq, dkv, dk_rope = run(ops.mla_attention, inputs, grads, causal=causal)
    assert o.shape == (2, 0, 32, 64) and lse.shape == (2, 0, 32) and dq.shape == inputs[0].shape
    assert (dkv == 0).all() and (dk_rope == 0).all()


def test_mla_attention_reads_views_in_place(device):
    (q, kv, k_rope), grads = make(DIMS["no_groups"], 2, 33, torch.float32, device)
    want = run(ops.mla_attention, (q, kv, k_rope), grads)

    def strided(t):
        wide = torch.full((*t.shape[:-1], t.size(-1) + 9), float("nan"), device=device)
        wide[..., 4:-5] = t
        return wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 4:-5]

    views = [strided(t) for t in (q, kv, k_rope)]
    assert not any(t.is_contiguous() for t in views)
    got = run(ops.mla_attention, views, grads)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_mla_attention_takes_expanded_output_gradients(device):
    inputs, _ = make(DIMS["no_groups"], 2, 20, torch.float32, device)
    q, kv, k_rope = (t.requires_grad_() for t in inputs)
    o, _ = ops.mla_attention(q, kv, k_rope, 0.3)
    got = torch.autograd.grad(o.sum(), (q, kv, k_rope))  # the gradient of sum() has stride 0
    want = run(ops.mla_attention, inputs, (torch.ones_like(o), torch.zeros(2, 20, 3).to(device)))
    assert all(torch.equal(a, b) for a, b in zip(got, want[2:], strict=True))


def test_mla_attention_of_lse_alone_has_gradients(device):
    inputs, (do, dlse) = make(DIMS["no_groups"], 2, 20, torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs]
    got = torch.autograd.grad(ops.mla_attention(*leaves, 0.3)[1], leaves, dlse)
    want = run(ops.mla_attention, inputs, (torch.zeros_like(do), dlse))
    assert all(torch.equal(a, b) for a, b in zip(got, want[2:], strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_mla_attention_passes_gradcheck(packed):
    inputs, _ = make((4, 2, 3, 2, 3), 1, 7, torch.float64, "cpu", 7 if packed else 9)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32) if packed else None
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: ops.mla_attention(*t, 0.4, cu), leaves)


def test_mla_attention_groups_equal_repeated_heads(device):
    (q, kv, k_rope), grads = make(DIMS["3b"], 2, 50, torch.float32, device)
    want = run(ops.mla_attention, (q, kv, k_rope), grads)
    got = run(ops.mla_attention, (q, kv.repeat_interleave(3, dim=2), k_rope), grads)
    got[3] = got[3].unflatten(2, (8, 3)).sum(3)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_mla_attention_equals_absorbed_decode(device):
    _, G, Dn, E, Dv = DIMS["3b"]
    (q, _, k_rope), _ = make(DIMS["3b"], 2, 5, torch.float32, device, S=60)
    latent = torch.randn(2, 60, 128, device=device)
    weight = torch.randn(G * (Dn + Dv), 128, device=device) / 128**0.5
    got = ops.mla_attention(q, (latent @ weight.t()).unflatten(-1, (G, -1)), k_rope, 0.1)
    cache = torch.cat((latent, k_rope), dim=-1).view(8, 15, 128 + E)
    table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
    lengths = torch.full((2,), 60, dtype=torch.int32, device=device)
    want = ops.mla_decode(q, cache, table, lengths, 0.1, weight, G)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_mla_attention_in_chunks_of_queries_equals_the_whole(device):
    (q, kv, k_rope), _ = make(DIMS["1b"], 2, 150, torch.float32, device)
    o, lse = ops.mla_attention(q, kv, k_rope, 0.3)
    for a, b in ((0, 1), (1, 8), (8, 136), (136, 150)):
        part = ops.mla_attention(q[:, a:b], kv[:, :b], k_rope[:, :b], 0.3)
        assert relative_error(part[0], o[:, a:b]) < 1e-5
        assert relative_error(part[1], lse[:, a:b]) < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("step", [0.0, 21.0, 1e4])
def test_mla_attention_survives_adversarial_scores(sign, step, device):
    inputs, grads = make((4, 2, 4, 2, 8), 1, 150, torch.float32, device)
    inputs[0][..., 4:] = torch.tensor([1.0, 0.0], device=device)
    inputs[0][..., :4] = 0
    inputs[2][..., 0] = sign * step / 0.3 * torch.arange(150.0, device=device)
    got = run(ops.mla_attention, inputs, grads)
    truth = run(
        reference.mla_attention, *([t.double().cpu() for t in ts] for ts in (inputs, grads))
    )
    # The whole of lse can be log(1 + exp(-21)), less than the rounding of the 1.
    torch.testing.assert_close(got.pop(1).double().cpu(), truth.pop(1), rtol=1e-6, atol=1e-6)
    errors = [relative_error(a, b) for a, b in zip(got, truth, strict=True)]
    assert max(errors) < 2e-6, errors


def test_mla_attention_is_deterministic(device):
    inputs, grads = make(DIMS["1b"], 2, 130, torch.bfloat16, device)
    first = run(ops.mla_attention, inputs, grads)
    for _ in range(3):
        again = run(ops.mla_attention, inputs, grads)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_mla_attention_does_not_depend_on_threads():
    inputs, grads = make(DIMS["1b"], 2, 130, torch.bfloat16, "cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(ops.mla_attention, inputs, grads))
    finally:
        torch.set_num_threads(before)
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def test_mla_attention_keeps_nan_in_its_sequence(device):
    inputs, grads = make(DIMS["1b"], 3, 70, torch.float32, device)
    want = run(ops.mla_attention, inputs, grads)
    inputs[1][1, 5, 2, 3] = float("nan")
    got = run(ops.mla_attention, inputs, grads)
    assert got[0][1].isnan().any()
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_mla_attention_passes_opcheck(packed, device):
    inputs, _ = make((4, 2, 3, 2, 3), 1, 7, torch.float32, device)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=device) if packed else None
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.zebra.mla_attention.default, (*leaves, 0.3, cu))


def test_mla_attention_compiles_fullgraph(device):
    inputs, grads = make(DIMS["no_groups"], 2, 20, torch.float32, device)
    compiled = torch.compile(ops.mla_attention, fullgraph=True, backend="aot_eager")
    got, want = (run(fn, inputs, grads) for fn in (compiled, ops.mla_attention))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_mla_attention_survives_graph_replay():
    inputs, (do, dlse) = make(DIMS["1b"], 1, 100, torch.bfloat16, "cuda")
    cu = torch.tensor([0, 30, 100], dtype=torch.int32, device="cuda")

    def both():
        o, lse = ops.mla_attention(*inputs, 0.3, cu)
        backward = torch.ops.zebra.mla_attention_backward
        return [o, lse, *backward(do, dlse, *inputs, o, lse, 0.3, cu, True)]

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    inputs[0].normal_()
    cu.copy_(torch.tensor([0, 77, 100]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, both(), strict=True))


def cu_seqlens(*values):
    return torch.tensor(values, dtype=torch.int32)


REJECTED = {
    "q_rank": (lambda q, kv, r: (q[0], kv, r), r"q must be \[B, T, H, Dn \+ E\] with H >= 1"),
    "q_dtype": (lambda q, kv, r: (q.int(), kv, r), "q must be float32, bfloat16 or float16"),
    "kv_dtype": (lambda q, kv, r: (q, kv.half(), r), "kv must be float32 like q"),
    "kv_tokens": (
        lambda q, kv, r: (q, kv[:, 1:], r),
        r"kv must be \[B, S, G, Dn \+ Dv\] = \[2, 9, any, any\], got \[2, 8, 2, 8\]",
    ),
    "groups": (
        lambda q, kv, r: (q[:, :, :3], kv, r),
        r"kv must be \[B, S, G, Dn \+ Dv\] with G a divisor of H = 3",
    ),
    "no_values": (lambda q, kv, r: (q, kv[..., :3], r), r"kv must be .* wider than Dn = 4"),
    "rope_batch": (
        lambda q, kv, r: (q, kv, r[:1]),
        r"k_rope must be \[B, S, E\] = \[2, any, any\], got \[1, 9, 2\]",
    ),
    "rope_width": (
        lambda q, kv, r: (q[..., :1], kv, r),
        r"k_rope must be \[B, S, E\] with E at most Dn \+ E = 1",
    ),
    "more_queries_than_keys": (
        lambda q, kv, r: (q, kv[:, :6], r[:, :6]),
        r"k_rope must be \[B, S, E\] with S >= T = 7",
    ),
    "strides": (
        lambda q, kv, r: (q, kv.transpose(2, 3).contiguous().transpose(2, 3), r),
        "kv must be contiguous in its last dimension",
    ),
    "packed_batch": (
        lambda q, kv, r: (q, kv, r, 1.0, cu_seqlens(0, 7)),
        r"q must be \[1, T, H, Dn \+ E\] with cu_seqlens",
    ),
    "packed_prefix": (
        lambda q, kv, r: (q[:1], kv[:1], r[:1], 1.0, cu_seqlens(0, 7)),
        r"k_rope must be \[B, S, E\] with S = T = 7 with cu_seqlens",
    ),
    "cu_dtype": (
        lambda q, kv, r: (q[:1], kv[:1, :7], r[:1, :7], 1.0, cu_seqlens(0, 7).long()),
        "cu_seqlens must be int32",
    ),
    "cu_empty": (
        lambda q, kv, r: (q[:1], kv[:1, :7], r[:1, :7], 1.0, cu_seqlens(0)),
        r"cu_seqlens must be \[n_seq \+ 1\] with T = 7 tokens in at least one sequence, got \[1\]",
    ),
}
REJECTED_ON_CPU = {
    "cu_falls": (
        lambda q, kv, r: (q[:1], kv[:1, :7], r[:1, :7], 1.0, cu_seqlens(0, 5, 4, 7)),
        "cu_seqlens must be non-decreasing from 0 to T = 7, got 4 at index 2",
    ),
    "cu_ends_early": (
        lambda q, kv, r: (q[:1], kv[:1, :7], r[:1, :7], 1.0, cu_seqlens(0, 5)),
        "cu_seqlens must be non-decreasing from 0 to T = 7, got 5 at index 1",
    ),
}


def rejected(change, device):
    """The arguments of a refused call."""
    inputs, _ = make((4, 2, 4, 2, 4), 2, 7, torch.float32, "cpu", S=9)
    args = change(*inputs)
    args = args if len(args) > 3 else (*args, 1.0)
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("case", REJECTED)
def test_mla_attention_rejects(case, device):
    change, message = REJECTED[case]
    args = rejected(change, device)
    message = "zebra::mla_attention: " + message
    assert_rejected(message, ops.mla_attention, _mla_attention_composite, *args)


@pytest.mark.parametrize("case", REJECTED_ON_CPU)
def test_mla_attention_rejects_wrong_boundaries_on_the_cpu(case):
    change, message = REJECTED_ON_CPU[case]
    with pytest.raises(RuntimeError, match="zebra::mla_attention: " + message):
        ops.mla_attention(*rejected(change, "cpu"))
