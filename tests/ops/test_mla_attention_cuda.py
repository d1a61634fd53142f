"""mla_attention around torch's cuDNN and flash attention.

The choice and the wiring run anywhere, against an emulation of the two libraries; the libraries
themselves on a GPU.
"""

import types
from itertools import pairwise

import pytest
import tolerances
import torch

from zebra import ops
from zebra.ops import _attention_library as library
from zebra.ops import attention, reference
from zebra.ops._attention_library import COMPOSITE, CUDNN, FLASH, Libraries, Problem, choose
from zebra.testing import assert_close, relative_error

BF16, FP16 = torch.bfloat16, torch.float16
ALL = Libraries(cudnn=True, flash=True)
# H, G, Dn, E, Dv
DIMS = {
    "1b": (32, 8, 32, 32, 64),
    "3b": (24, 8, 64, 64, 128),
    "no_rope": (4, 4, 64, 0, 64),
    "no_nope": (4, 2, 0, 64, 64),
    "one_head": (1, 1, 8, 8, 16),
    "deepseek": (4, 4, 128, 64, 128),  # keys and values of different widths
}


def problem(**changes):
    given = {"dtype": BF16, "T": 64, "S": 64, "nope": 64, "rope": 64, "v_dim": 128}
    return Problem(**given | {"causal": True, "packed": False} | changes)


CHOICES = {
    "square": ({}, CUDNN),
    "non_causal_prefix": ({"S": 100, "causal": False}, CUDNN),
    "prefix": ({"S": 100}, FLASH),
    "packed": ({"packed": True}, FLASH),
    "one_key": ({"T": 1, "S": 1}, FLASH),
    "wide": ({"nope": 128, "v_dim": 192}, FLASH),
    "deepseek": ({"nope": 128}, CUDNN),
    "deepseek_packed": ({"nope": 128, "packed": True}, COMPOSITE),
    "values_narrower": ({"v_dim": 64}, COMPOSITE),
    "odd_nope": ({"nope": 60, "v_dim": 124}, COMPOSITE),
    "too_wide": ({"nope": 256, "v_dim": 320}, COMPOSITE),
    "float32": ({"dtype": torch.float32}, COMPOSITE),
    "no_queries": ({"T": 0}, COMPOSITE),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_library_follows_from_the_shape(case):
    changes, want = CHOICES[case]
    assert choose(problem(**changes), ALL) == want


def test_the_library_follows_from_the_device_and_determinism():
    assert choose(problem(), Libraries(cudnn=False, flash=True)) == FLASH
    assert choose(problem(), Libraries(cudnn=False, flash=False)) == COMPOSITE
    assert choose(problem(), ALL, deterministic=True) == CUDNN  # of the output
    whole = problem(T=256, S=256)
    assert choose(whole, ALL, backward=True) == CUDNN
    assert choose(whole, ALL, backward=True, deterministic=True) == FLASH


@pytest.mark.parametrize("changes", [{}, {"T": 1, "S": 128}, {"causal": False, "T": 128, "S": 192}])
def test_cudnn_gives_gradients_of_whole_tiles_only(changes):
    p = problem(**changes)
    assert choose(p, ALL) == (CUDNN if p.T == p.S or not p.causal else FLASH)
    assert choose(p, ALL, backward=True) == FLASH


def make(dims, B, T, dtype, device, S=None):
    """q, kv, k_rope in rows of NaN slack, and the output's gradient."""
    H, G, Dn, E, Dv = dims
    S = T if S is None else S

    def slack(*shape):
        wide = torch.full((*shape[:-1], shape[-1] + 16), float("nan"), dtype=dtype, device=device)
        wide[..., 8:-8] = torch.randn(shape, device=device).to(dtype)
        return wide[..., 8:-8]

    inputs = slack(B, T, H, Dn + E), slack(B, S, G, Dn + Dv), slack(B, S, E)
    return inputs, torch.randn(B, T, H, Dv, device=device).to(dtype)


def truth(inputs, do, cu_seqlens, causal, dtype=torch.float64, scale=0.2):
    """[o, lse, dq, dkv, dk_rope] of eager at a dtype, on the CPU; lse without a gradient."""
    leaves = [t.detach().cpu().to(dtype).requires_grad_() for t in inputs]
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.cpu()
    o, lse = reference.mla_attention(*leaves, scale, cu_seqlens, causal)
    return [o, lse, *torch.autograd.grad(o, leaves, do.cpu().to(dtype))]


def rounded(inputs, do, cu_seqlens, causal, scale=0.2):
    """[o, lse, dq, dkv, dk_rope] in fp32 with every rounding that attention on matrix units makes.

    Probabilities enter their products in 16 bits, and so do the gradients of scores; the backward
    pass reads o as rounded; keys' gradients are rounded a head before a group's are added up.
    """
    q, kv, k_rope = (t.detach().cpu() for t in inputs)
    dtype, group, (T, S) = q.dtype, q.size(2) // kv.size(2), (q.size(1), kv.size(1))
    nope = q.size(3) - k_rope.size(2)

    def cut(t):
        return t.to(dtype).float()

    def of_groups(t):
        return cut(cut(t).unflatten(1, (-1, group)).sum(2)).transpose(1, 2)

    key = torch.cat((kv[..., :nope], k_rope[:, :, None].expand(-1, -1, kv.size(2), -1)), -1)
    q, do, k, v = (t.float().transpose(1, 2) for t in (q, do.cpu(), key, kv[..., nope:]))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    at = torch.arange(S)
    hidden = (at > at[S - T :, None]) & causal
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens.cpu()[1:].contiguous(), at.int(), right=True)
        hidden = hidden | (sequence != sequence[:, None])
    s = (scale * q @ k.mT).masked_fill(hidden, float("-inf"))
    p = torch.exp(s - s.amax(-1, keepdim=True))
    total = p.sum(-1, keepdim=True)
    o = cut(cut(p) @ v / total)
    p = p / total
    ds = cut(p * (do @ v.mT - (do * o).sum(-1, keepdim=True)))
    dk, dv = of_groups(scale * ds.mT @ q), of_groups(cut(p).mT @ do)
    results = [o.transpose(1, 2), s.logsumexp(-1).transpose(1, 2), (scale * ds @ k).transpose(1, 2),
               torch.cat((dk[..., :nope], dv), -1), dk[..., nope:].sum(2)]  # fmt: skip
    return [t if i == 1 else t.to(dtype) for i, t in enumerate(results)]


def check(got, inputs, do, cu_seqlens=None, causal=True):
    want = truth(inputs, do, cu_seqlens, causal)
    eager = rounded(inputs, do, cu_seqlens, causal)
    names = ("o", "lse", "dq", "dkv", "dk_rope")
    for name, g, w, e in zip(names, got, want, eager, strict=True):
        assert g.shape == w.shape and g.is_contiguous(), name
        op = "mla_attention.library" + (".gradient" if name.startswith("d") else "")
        assert_close(g, w, e, tolerances.factor(op, g.dtype), name)


def both(served, inputs, do, cu_seqlens=None, causal=True, scale=0.2):
    """[o, lse, dq, dkv, dk_rope] of a library, whichever would be chosen."""
    o, lse = library.forward(served, *inputs, scale, cu_seqlens, causal)
    grads = library.backward(served, do, *inputs, o, lse, scale, cu_seqlens, causal)
    return [o, lse, *grads]


# Wiring: what the two libraries are asked for, without them.


class Emulated:
    """The libraries' functions in fp32, with what they insist on."""

    @staticmethod
    def _softmax(q, k, causal, corner, scale):
        """Scores [B, H, T, S] of q and k [B, H or G, tokens, width]."""
        for t in (q, k):
            assert t.stride(-1) == 1 and all(s % 8 == 0 for s in t.stride()[:-1])
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        s = scale * q.float() @ k.float().transpose(2, 3)
        if causal:
            shift = 0 if corner == "upper left" else s.size(3) - s.size(2)
            hidden = torch.ones(s.shape[2:], dtype=torch.bool).triu(shift + 1)
            s = s.masked_fill(hidden, float("-inf"))
        return s

    def _forward(self, q, k, v, causal, corner, scale):
        s = self._softmax(q, k, causal, corner, scale)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
        return (s.softmax(-1) @ v.float()).to(q.dtype), s.logsumexp(-1)

    def _backward(self, do, q, k, v, o, lse, causal, corner, scale):
        r = q.size(1) // k.size(1)
        p = torch.exp(self._softmax(q, k, causal, corner, scale) - lse[..., None])
        wide_v, do = v.repeat_interleave(r, dim=1).float(), do.float()
        ds = scale * p * (do @ wide_v.transpose(2, 3) - (do * o.float()).sum(-1, keepdim=True))

        def group(t):
            return t.unflatten(1, (-1, r)).sum(2).to(q.dtype)

        dq = (ds @ k.repeat_interleave(r, dim=1).float()).to(q.dtype)
        return dq, group(ds.transpose(2, 3) @ q.float()), group(p.transpose(2, 3) @ do)

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, want_lse, p=0.0, causal=False, *, scale=None
    ):
        if q.is_meta:
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, bias, want_lse, p, causal, scale=scale
            )
        assert bias is None and want_lse and p == 0.0
        assert q.transpose(1, 2).is_contiguous()
        o, lse = self._forward(q, k, v, causal, "upper left", scale)
        return o.transpose(1, 2).contiguous().transpose(1, 2), lse[..., None], None

    def _scaled_dot_product_cudnn_attention_backward(
        self, do, q, k, v, o, lse, seed, offset, bias, cu_q, cu_k, T, S, p, causal, *, scale=None
    ):
        assert bias is None and cu_q is None and cu_k is None and p == 0.0
        assert q.size(2) == T and k.size(2) == S and lse.is_contiguous()
        assert lse.shape == (*q.shape[:3], 1)
        assert o.stride() == do.stride() and o.transpose(1, 2).is_contiguous()
        grads = self._backward(do, q, k, v, o, lse[..., 0], causal, "upper left", scale)
        return tuple(g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads)

    def _bounds(self, cu, tokens):
        return [(0, tokens)] if cu is None else list(pairwise(cu.tolist()))

    def _flash_attention_forward(self, q, k, v, cu_q, cu_k, T, S, p, causal, mask, *, scale=None):
        assert (cu_q is cu_k) and p == 0.0 and not mask
        if cu_q is None:
            assert q.size(1) == T and k.size(1) == S
            o, lse = self._forward(*(t.transpose(1, 2) for t in (q, k, v)), causal, "lower right",
                                   scale)  # fmt: skip
            return o.transpose(1, 2).contiguous(), lse, None
        assert q.dim() == 3
        parts = [
            self._forward(*(t[None, a:b].transpose(1, 2) for t in (q, k, v)), causal,
                          "lower right", scale)
            for a, b in self._bounds(cu_q, T) if b > a
        ]  # fmt: skip
        o = torch.cat([o[0].transpose(0, 1) for o, _ in parts])
        return o.contiguous(), torch.cat([lse[0] for _, lse in parts], dim=1), None

    def _flash_attention_backward(
        self, do, q, k, v, o, lse, cu_q, cu_k, T, S, p, causal, seed, offset, *, scale=None
    ):
        assert (cu_q is cu_k) and p == 0.0 and lse.is_contiguous()
        rows = [t if cu_q is None else t[None] for t in (do, q, k, v, o)]
        lse = lse if cu_q is None else lse[None]
        parts = []
        for a, b in self._bounds(cu_q, T):
            cut = slice(None) if cu_q is None else slice(a, b)
            part = [t[:, cut].transpose(1, 2) for t in rows]
            grads = self._backward(*part, lse[:, :, cut], causal, "lower right", scale)
            parts.append([g.transpose(1, 2) for g in grads])
        grads = tuple(torch.cat(g, dim=1) for g in zip(*parts, strict=True))
        return grads if cu_q is None else tuple(g[0] for g in grads)


@pytest.fixture
def emulated(monkeypatch):
    """The libraries emulated, and the assembly kernels served by their composites."""
    monkeypatch.setattr(library, "_aten", Emulated())
    internal = types.SimpleNamespace(
        _mla_attention_keys=attention._keys_composite,
        _mla_attention_key_gradients=attention._key_gradients_composite,
    )
    monkeypatch.setattr(library, "_zebra", internal)
    library._cudnn_lse_dims.cache_clear()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("served", [CUDNN, FLASH])
def test_wiring_of_both_libraries(served, causal, dims, dtype, emulated):
    inputs, do = make(dims, 2, 19, dtype, "cpu")
    check(both(served, inputs, do, causal=causal), inputs, do, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_wiring_after_a_prefix(causal, emulated):
    inputs, do = make(DIMS["1b"], 2, 7, BF16, "cpu", S=30)
    check(both(FLASH, inputs, do, causal=causal), inputs, do, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_wiring_of_packed_sequences(causal, emulated):
    inputs, do = make(DIMS["1b"], 1, 40, BF16, "cpu")
    cu = torch.tensor([0, 3, 3, 30, 40], dtype=torch.int32)
    check(both(FLASH, inputs, do, cu, causal), inputs, do, cu, causal)


@pytest.mark.parametrize("served", [CUDNN, FLASH])
def test_torch_takes_the_calls_and_gives_these_shapes(served, monkeypatch):
    """Against torch's own meta functions: argument order, count and shapes."""
    inputs, do = make(DIMS["3b"], 2, 16, BF16, "meta")
    o, lse, *grads = both(served, inputs, do)
    assert o.shape == do.shape and lse.shape == do.shape[:3]
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    if served == FLASH:
        inputs, do = make(DIMS["3b"], 1, 16, BF16, "meta")
        cu = torch.empty(3, dtype=torch.int32, device="meta")
        o, lse, *grads = both(served, inputs, do, cu)
        assert o.shape == do.shape and lse.shape == do.shape[:3]
        assert [g.shape for g in grads] == [t.shape for t in inputs]


def test_operands_are_copied_only_where_they_must_be():
    (_, kv, k_rope), _ = make(DIMS["1b"], 2, 9, BF16, "cpu")
    assert library._vectors(kv) is kv and library._vectors(k_rope) is k_rope
    odd = torch.randn(2, 9, 8, 97).to(BF16)[..., 1:]
    assert library._vectors(odd).is_contiguous()


def test_a_shape_that_cudnn_refused_is_not_asked_for_again(emulated, monkeypatch):
    """The second call would end the process: see _planned."""
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise RuntimeError("cuDNN Frontend error: no plan\nmore")

    monkeypatch.setattr(library, "_refused", {})
    monkeypatch.setattr(library._aten, "_scaled_dot_product_cudnn_attention", refuse, raising=False)
    inputs, _ = make(DIMS["1b"], 2, 16, BF16, "cpu")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"mla_attention: cuDNN's forward .*no plan; torch"):
            library.forward(CUDNN, *inputs, 0.2, None, True)
    assert len(calls) == 1

    def exhaust(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(library._aten, "_scaled_dot_product_cudnn_attention", exhaust)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            library.forward(CUDNN, *inputs, 0.2, None, False)


# The libraries themselves.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize("T", [2, 37, 129, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("served", [CUDNN, FLASH])
def test_libraries_match_reference(served, causal, T, dims, dtype):
    _, _, Dn, E, Dv = dims
    p = problem(nope=Dn, rope=E, v_dim=Dv, causal=causal, dtype=dtype, T=T, S=T)
    if choose(p, Libraries(served == CUDNN, served == FLASH)) != served:
        return  # this library does not take this width
    inputs, do = make(dims, 2, T, dtype, "cuda")
    check(both(served, inputs, do, causal=causal), inputs, do, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 70), (7, 70), (64, 200), (129, 130)], ids=str)
def test_flash_matches_reference_after_a_prefix(shape, causal):
    T, S = shape
    inputs, do = make(DIMS["3b"], 2, T, BF16, "cuda", S)
    check(both(FLASH, inputs, do, causal=causal), inputs, do, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", ["1b", "3b"])
def test_flash_matches_reference_on_packed_sequences(dims, causal):
    inputs, do = make(DIMS[dims], 1, 400, BF16, "cuda")
    cu = torch.tensor([0, 1, 40, 40, 305, 400], dtype=torch.int32, device="cuda")
    check(both(FLASH, inputs, do, cu, causal), inputs, do, cu, causal)


def gradients(inputs, do, cu_seqlens=None, causal=True, scale=0.2):
    """[o, dq, dkv, dk_rope] of the operator, without a gradient of lse."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    o, _ = ops.mla_attention(*leaves, scale, cu_seqlens, causal)
    return [o, *torch.autograd.grad(o, leaves, do)]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize("T", [1, 65, 128])
def test_the_operator_takes_what_was_chosen(T, dims):
    inputs, do = make(dims, 2, T, BF16, "cuda")
    o, *grads = gradients(inputs, do)
    lse = ops.mla_attention(*inputs, 0.2)[1]
    check([o, lse, *grads], inputs, do)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", ["1b", "3b", "deepseek"])
@pytest.mark.parametrize("T", [2, 37, 64, 128, 192, 256])
def test_rows_of_very_low_scores_have_gradients(T, dims, causal):
    """All scores near -120: exp(-lse) is infinite, also of the rows that only pad a tile."""
    torch.use_deterministic_algorithms(False)  # the form that is fast
    inputs, do = make(DIMS[dims], 2, T, BF16, "cuda")
    inputs[0][..., 0], inputs[1][..., 0] = 1.0, -600.0
    want = truth(inputs, do, None, causal)
    o, *grads = gradients(inputs, do, causal=causal)
    for g in (o, *grads):
        assert g.isfinite().all()
    # dq's first column is 600 times a sum that cancels
    assert relative_error(o, want[0]) < 1e-2 and relative_error(grads[1], want[3]) < 5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_deterministic_where_asked_for(packed):
    inputs, do = make(DIMS["3b"], 1, 700, BF16, "cuda")
    cu = torch.tensor([0, 300, 700], dtype=torch.int32, device="cuda") if packed else None
    first = gradients(inputs, do, cu)
    for _ in range(3):
        again = gradients(inputs, do, cu)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_both_passes_survive_graph_replay(packed):
    inputs, do = make(DIMS["1b"], 1, 256, BF16, "cuda")
    cu = torch.tensor([0, 60, 256], dtype=torch.int32, device="cuda") if packed else None
    torch.use_deterministic_algorithms(False)  # the form that is fast

    def run():
        o, lse = ops.mla_attention(*inputs, 0.2, cu)
        backward = torch.ops.zebra.mla_attention_backward
        return [o, lse, *backward(do, None, *inputs, o, lse, 0.2, cu, True)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    inputs[0].normal_()
    if packed:
        cu.copy_(torch.tensor([0, 133, 256]))
    graph.replay()
    # dq is summed in any order: equal to rounding
    assert all(relative_error(a, b) < 2e-3 for a, b in zip(got, run(), strict=True))


@pytest.mark.gpu
def test_the_models_shapes_are_served_by_cudnn_on_hopper():
    if torch.cuda.get_device_capability() == (9, 0):
        assert choose(problem(), Libraries.on(torch.device("cuda"))) == CUDNN
