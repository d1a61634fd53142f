"""mla_project_append: what it writes, its norm of hidden, and few tokens at once on CUDA."""

import pytest
import torch
from mla_project_cases import DIMS, make, rejected, wide, with_cache
from refusals import assert_rejected

from zebra import ops
from zebra.ops import reference
from zebra.ops.project import _mla_project_append_composite
from zebra.testing import relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
APPENDS = [ops.mla_project_append, _mla_project_append_composite]


@pytest.mark.parametrize("append", APPENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "slots",
    [
        [0, 1, 2, 3, 4, 5],
        [31, 9, 8, 16, 0, 7],
        [-1, -1, 5, -7, 0, -1],
        [4, -1, -1, -1, -1, -1],
        [-1] * 6,
    ],
    ids=str,
)
def test_mla_project_append_writes_its_slots_and_nothing_else(slots, dtype, append, device):
    args = make(DIMS["odd"], dtype, device, (2, 3), norms=True)
    want_q, want = ops.mla_project(**args)
    args = with_cache(args, slots)
    cache = args["cache"]
    q, latent = append(**args)
    tolerance = 4 * torch.finfo(dtype).eps
    assert relative_error(q, want_q) < tolerance and relative_error(latent, want) < tolerance
    expected = torch.full_like(cache, float("nan"))
    for slot, row in zip(slots, latent.flatten(0, 1), strict=True):
        if slot >= 0:
            expected[slot // 8, slot % 8] = row
    assert torch.equal(cache.nan_to_num(1e3), expected.nan_to_num(1e3))
    base = cache._base if cache._base is not None else cache
    assert base.isfinite().sum() == expected.isfinite().sum()  # nothing beside the view either


@pytest.mark.parametrize("append", APPENDS)
def test_mla_project_append_takes_pages_that_lie_between_each_other(append, device):
    """The rows of all pages by offset: apart in memory, though a page's stride is the smaller."""
    args = with_cache(make(DIMS["odd"], torch.float32, device, (2, 3)), [31, 9, 8, 16, 0, 7])
    plain = args["cache"].clone()
    append(**args | {"cache": plain})
    mixed = args["cache"].transpose(0, 1).contiguous().transpose(0, 1)
    append(**args | {"cache": mixed})
    assert torch.equal(mixed.nan_to_num(1e3), plain.nan_to_num(1e3))


@pytest.mark.parametrize("append", APPENDS)
def test_mla_project_append_without_tokens_writes_nothing(append):
    args = with_cache(make(DIMS["odd"], torch.float32, "cpu", (0, 3)), [])
    q, latent = append(**args)
    assert q.shape == (0, 3, 3, 11) and latent.shape == (0, 3, 13)
    assert args["cache"].isnan().all()


def test_mla_project_append_of_padding_accepts_an_empty_cache(device):
    args = make(DIMS["odd"], torch.float32, device, (2, 3))
    want = ops.mla_project(**args)
    got = ops.mla_project_append(**with_cache(args, [-1] * 6, pages=0))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_mla_project_append_checks_every_slot_before_it_writes():
    args = with_cache(make(DIMS["odd"], torch.float32, "cpu", (2, 3)), [0, 1, 2, 3, 4, 32])
    message = r"zebra::mla_project_append: slot_mapping must be negative \(not stored\) or at most "
    with pytest.raises(RuntimeError, match=message + r"pages \* page - 1 = 31, got 32 at \[1, 2\]"):
        ops.mla_project_append(**args)
    assert args["cache"].isnan().all()


def test_mla_project_append_then_decode_equals_attention(device):
    H, Dn, E, R, G, Dv = 6, 8, 4, 20, 3, 10
    args = make((32, 24, H, Dn, E, R), torch.float32, device, (2, 9))
    args["positions"] = torch.arange(9, device=device).repeat(2, 1)
    slots = [*range(16, 25), *range(32, 41)]  # sequence 0 in pages 2 and 3, 1 in 4 and 5
    args = with_cache(args, slots, pages=6)
    q, latent = ops.mla_project_append(**args)
    weight = torch.randn(G * (Dn + Dv), R, device=device) / R**0.5
    table = torch.tensor([[2, 3], [4, 5]], dtype=torch.int32, device=device)
    lengths = torch.full((2,), 9, dtype=torch.int32, device=device)
    got = ops.mla_decode(q, args["cache"], table, lengths, 0.3, weight, G)
    kv = (latent[..., :R] @ weight.t()).unflatten(-1, (G, -1))
    want = ops.mla_attention(q, kv, latent[..., R:], 0.3)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("append", APPENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_dtype", [None, torch.float32], ids=str)
def test_mla_project_append_normalises_its_input(norm_dtype, dtype, append, device):
    args = make(DIMS["odd"], dtype, device, (2, 3), norms=True)
    weight = (1 + 0.1 * torch.randn(33)).to(norm_dtype or dtype).to(device)
    normed = wide(args)
    normed["hidden"] = reference.rms_norm(normed["hidden"], weight.cpu().double(), eps=1e-3)[0]
    want = reference.mla_project(**normed)
    args = with_cache(args, [0, 1, -1, 3, 4, 5])
    got = append(**args, input_norm_weight=weight, input_norm_eps=1e-3)
    tolerance = 4 * torch.finfo(dtype).eps
    assert all(relative_error(a, b) < tolerance for a, b in zip(got, want, strict=True))
    assert torch.equal(args["cache"][0, 5], got[1][1, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [None, "q_a", "input"])
@pytest.mark.parametrize("q_a", [False, True])
@pytest.mark.parametrize("dims", ["1b_heads", "3b_heads", "8b_heads", "no_rope", "no_nope"])
def test_mla_project_append_of_few_tokens_matches_reference(dims, q_a, norm, dtype, device):
    """Widths that Hopper multiplies, turns and stores in one launch, or two with q_a_weight."""
    width = DIMS[dims][0]
    for shape in [(1, 1), (4, 2), (3, 3), (2, 30), (1, 128)]:
        args = make(DIMS[dims], dtype, device, shape, q_a, maxpos=40)
        truth, extra = wide(args), {}
        weight = (1 + 0.1 * torch.randn(args["q_b_weight"].size(1) if norm == "q_a" else width)).to(
            dtype
        )
        if norm == "q_a":
            args["q_a_norm_weight"] = weight.to(device)
            truth["q_a_norm_weight"] = weight.double()
        elif norm == "input":
            extra["input_norm_weight"] = weight.to(device)
            truth["hidden"] = reference.rms_norm(truth["hidden"], weight.double(), eps=1e-5)[0]
        tokens = shape[0] * shape[1]
        slots = [-1 if t % 5 == 2 else 7 * t % 131 for t in range(tokens)]
        args = with_cache(args, slots, pages=17, gap=4)
        got = ops.mla_project_append(**args, **extra)
        tolerance = 4 * torch.finfo(dtype).eps
        for a, b in zip(got, reference.mla_project(**truth), strict=True):
            assert a.shape == b.shape and relative_error(a, b) < tolerance
        expected = torch.full_like(args["cache"], float("nan"))
        for slot, row in zip(slots, got[1].flatten(0, 1), strict=True):
            if slot >= 0:
                expected[slot // 8, slot % 8] = row
        assert torch.equal(args["cache"].nan_to_num(1e3), expected.nan_to_num(1e3))


@pytest.mark.gpu
def test_mla_project_append_of_few_tokens_gives_nan_outside_of_the_tables():
    args = make(DIMS["8b_heads"], torch.bfloat16, "cuda", (1, 4), q_a=False)
    args["positions"][0, 1], args["positions"][0, 3] = -1, 64
    slots = [3, 1, 136, 9]  # the third beyond the cache: not stored
    args = with_cache(args, slots, pages=17, gap=4)
    q, latent = ops.mla_project_append(**args)
    for t in range(4):
        outside = t % 2 == 1
        assert q[0, t, :, 64:].isnan().all() == outside and q[0, t, :, :64].isfinite().all()
        assert latent[0, t, 160:].isnan().all() == outside and latent[0, t, :160].isfinite().all()
    assert args["cache"][..., 0].isfinite().sum() == 3


def test_mla_project_append_passes_opcheck(device):
    args = with_cache(make(DIMS["odd"], torch.float32, device, (2, 3)), [3, -1, 9, 8, 0, 31])
    args["cache"] = torch.zeros_like(args["cache"])
    torch.library.opcheck(torch.ops.zebra.mla_project_append.default, (), args)


def test_mla_project_append_compiles_fullgraph(device):
    slots = [3, -1, 9, 8, 0, 31]
    args = make(DIMS["odd"], torch.float32, device, (2, 3))
    args = with_cache(args, slots) | {"cache": torch.zeros(4, 8, 13, device=device)}
    want_cache = args["cache"].clone()
    want = ops.mla_project_append(**args | {"cache": want_cache})
    compiled = torch.compile(ops.mla_project_append, fullgraph=True, backend="aot_eager")
    got = compiled(**args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(args["cache"], want_cache)


@pytest.mark.gpu
def test_mla_project_append_survives_graph_replay_with_other_slots():
    args = with_cache(make(DIMS["odd"], torch.bfloat16, "cuda", (2, 3)), [0, 1, 2, 3, 4, 5])
    ops.mla_project_append(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.mla_project_append(**args)
    for slots in ([8, -1, 9, -1, -1, 31], [-1] * 6):
        args["slot_mapping"].copy_(torch.tensor(slots).view(2, 3))
        args["cache"].fill_(float("nan"))
        graph.replay()
        written = args["cache"].isfinite().all(-1).flatten().nonzero().flatten().tolist()
        assert written == sorted(s for s in slots if s >= 0)


REJECTED_APPENDS = {
    "cache_width": (
        {"cache": lambda t: t[..., 1:]},
        r"cache must be \[pages, page, R \+ E\] = \[any, any, 13\], got \[4, 8, 12\]",
    ),
    "cache_dtype": ({"cache": lambda t: t.half()}, "cache must be float32 like hidden"),
    "pages_overlap": (
        {"cache": lambda t: t[:1].expand(4, -1, -1)},
        r"cache must be of rows that do not overlap, got \[4, 8, 13\] .* strides \[0, 16, 1\]",
    ),
    "rows_overlap": (
        {"cache": lambda t: t.as_strided(t.shape, (104, 12, 1))},
        "cache must be of rows that do not overlap",
    ),
    "pages_touch": (
        {"cache": lambda t: t.as_strided(t.shape, (103, 13, 1))},
        "cache must be of rows that do not overlap",
    ),
    "input_norm_shape": (
        {"input_norm_weight": lambda t: t[1:]},
        r"input_norm_weight must be \[D\] = \[33\], got \[32\]",
    ),
    "input_norm_dtype": (
        {"input_norm_weight": lambda t: t.half()},
        "input_norm_weight must be float32 like hidden, or float32",
    ),
    "slots_dtype": ({"slot_mapping": lambda t: t.int()}, "slot_mapping must be int64"),
    "slots_shape": ({"slot_mapping": lambda t: t[:1]}, r"slot_mapping must be \[B, T\] = \[2, 3\]"),
}


@pytest.mark.parametrize("case", REJECTED_APPENDS)
def test_mla_project_append_rejects(case, device):
    changes, message = REJECTED_APPENDS[case]
    args = with_cache(make(DIMS["odd"], torch.float32, device, (2, 3)), [0, 1, 2, 3, 4, 5])
    args["input_norm_weight"] = torch.ones(33, device=device)
    message = "zebra::mla_project_append: " + message
    assert_rejected(message, *APPENDS, **rejected(args, changes))
