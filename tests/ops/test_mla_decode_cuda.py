"""mla_decode's CUDA kernels: instances, rows, pages, cuts.  Their tiles need no GPU."""

import pytest
import torch
from mla_decode_cases import check, make

from zebra import _extension, ops
from zebra.testing import relative_error

HALF = [torch.bfloat16, torch.float16]


def latent(H, R, E, lengths, dtype, tokens=1, page=64):
    return make((H, 1, 0, E, R, R), lengths, dtype, "cuda", tokens, page, latent=True)


def assert_independent_of_the_batch(args, split):
    """Every sequence alone gives, bit for bit, what it gives in the batch; returns the latter."""
    want = ops.mla_decode(**args, split_size=split)
    for b in range(args["q"].size(0)):
        rows = {k: args[k][b : b + 1] for k in ("q", "block_table", "seq_lens")}
        got = ops.mla_decode(**args | rows, split_size=split)
        assert all(torch.equal(a, w[b : b + 1]) for a, w in zip(got, want, strict=True))
    return want


@pytest.mark.gpu
@pytest.mark.parametrize("portable", ["0", "1"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("E", [0, 8, 32, 64])
@pytest.mark.parametrize("R", [16, 64, 80, 96, 128, 160, 192, 256])
def test_latent_queries_match_reference_at_every_rank(R, E, dtype, portable, monkeypatch):
    monkeypatch.setenv("ZEBRA_PORTABLE", portable)
    check(latent(32, R, E, [700, 0, 33, 64, 1], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("H", [1, 4, 17, 24, 48, 128])
def test_latent_queries_match_reference_with_any_number_of_rows(H, tokens):
    check(latent(H, 128, 64, [1, 65, 200, tokens], torch.bfloat16, tokens))
    check(latent(H, 256, 64, [1, 65, 200, tokens], torch.float16, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [1, 16, 48, 64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 4])
def test_latent_queries_match_reference_at_every_edge_of_a_page(page, tokens):
    lengths = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000]
    check(latent(24, 160, 64, lengths, torch.bfloat16, tokens, page))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 64])
def test_uneven_batches_match_reference(page):
    check(latent(32, 160, 64, [4641, 9118, 1730, 1696], torch.bfloat16, page=page))
    check(latent(32, 128, 32, [(37 * i) % 91 for i in range(300)], torch.bfloat16, page=page))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("split", [1, 256])
def test_split_size_makes_results_independent_of_the_batch(page, split):
    args = latent(32, 160, 64, [900, 3, 0, 1500], torch.bfloat16, 2, page)
    want = assert_independent_of_the_batch(args, split)
    whole = ops.mla_decode(**args)
    assert all(relative_error(a, b) < 4e-3 for a, b in zip(whole, want, strict=True))


# H, G, Dn, E, Dv, R: of Zebra's models; sizes that tiles do not divide; a KV head for each head
WEIGHTED = [
    (32, 8, 32, 32, 64, 128),
    (24, 8, 64, 64, 128, 128),
    (32, 8, 64, 64, 128, 160),
    (9, 3, 24, 8, 40, 80),
    (16, 16, 128, 64, 136, 192),
    (4, 2, 0, 64, 16, 256),
]


@pytest.mark.gpu
@pytest.mark.parametrize("portable", ["0", "1"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("batch", [1, 5, 64, 300])
@pytest.mark.parametrize("dims", WEIGHTED, ids=str)
def test_weighted_queries_match_reference(dims, batch, dtype, portable, monkeypatch):
    monkeypatch.setenv("ZEBRA_PORTABLE", portable)
    lengths = [0 if b % 7 == 3 else 1 + (131 * b + 700 // batch) % 500 for b in range(batch)]
    args = make(dims, lengths, dtype, "cuda", tokens=1 + batch % 2, page=64)
    got = check(args)
    rows = torch.zeros(*args["q"].shape[:3], dims[2] + dims[3] + 6, dtype=dtype, device="cuda")
    rows[..., 2:-4] = args["q"]
    unaligned = ops.mla_decode(**args | {"q": rows[..., 2:-4]})
    assert all(torch.equal(a, b) for a, b in zip(got, unaligned, strict=True))


# H, R, E: DeepSeek's, sizes that tiles do not divide, ranks between instances.
WIDE = [(128, 512, 64), (16, 512, 64), (40, 512, 0), (64, 264, 8), (100, 448, 32), (33, 160, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("page", [8, 48, 64, 256])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dims", WIDE, ids=str)
def test_many_rows_and_wide_latents_match_reference(dims, tokens, page, dtype):
    lengths = [0, 1, 63, 64, 65, 128, 129, 2000]
    check(latent(*dims, lengths, dtype, tokens, page))


@pytest.mark.gpu
@pytest.mark.parametrize("portable", ["0", "1"])
def test_pages_that_wide_latents_have_no_kernel_for_match_reference(portable, monkeypatch):
    monkeypatch.setenv("ZEBRA_PORTABLE", portable)
    check(latent(16, 512, 64, [700, 0, 33], torch.bfloat16, page=12 if portable == "0" else 64))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize(
    "dims", [(128, 128, 128, 64, 128, 512), (32, 8, 64, 64, 128, 160)], ids=str
)
def test_weighted_queries_with_many_rows_match_reference(dims, batch):
    lengths = [0 if b % 7 == 3 else 1 + (131 * b + 700 // batch) % 500 for b in range(batch)]
    check(make(dims, lengths, torch.bfloat16, "cuda", tokens=2, page=64))


@pytest.mark.gpu
def test_split_size_makes_results_with_wide_latents_independent_of_the_batch():
    args = latent(128, 512, 64, [900, 3, 0, 1500], torch.bfloat16)
    assert_independent_of_the_batch(args, 256)


@pytest.mark.gpu
def test_split_size_makes_weighted_results_independent_of_the_batch():
    args = make(WEIGHTED[2], [900, 3, 0, 1500], torch.bfloat16, "cuda", 2, 64)
    assert_independent_of_the_batch(args, 256)


@pytest.mark.gpu
def test_a_graph_follows_lengths_and_queries():
    args = make(WEIGHTED[2], [900, 0, 64, 1500], torch.bfloat16, "cuda", 1, 64)
    ops.mla_decode(**args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = args["q"] * 1.0  # written by the kernel before
        results = [ops.mla_decode(**args | {"q": q}) for _ in range(3)]
    for lengths in ([900, 0, 64, 1500], [1, 0, 0, 700], [0, 0, 0, 0], [899, 0, 1, 1500]):
        args["seq_lens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        args["q"].copy_(torch.randn_like(args["q"]))
        graph.replay()
        want = ops.mla_decode(**args)
        torch.cuda.synchronize()
        for got in results:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[64], [60, 64, 1], [5000]], ids=str)
def test_what_follows_in_a_graph_finds_the_result(lengths):
    """Whether or not anything was cut: the last grid of a call ends after the others."""
    args = latent(32, 160, 64, lengths, torch.bfloat16)
    want = ops.mla_decode(**args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.mla_decode(**args)
        copies = [t.clone() for t in results]
    for _ in range(50):
        for t in results:
            t.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(copies, want, strict=True))


@pytest.mark.gpu
def test_repeats_are_bitwise_equal():
    args = latent(32, 64, 64, [777, 3, 4100], torch.bfloat16)
    want = ops.mla_decode(**args)
    for _ in range(1000):
        assert all(torch.equal(a, b) for a, b in zip(ops.mla_decode(**args), want, strict=True))


@pytest.mark.gpu
def test_two_streams_do_not_disturb_each_other():
    batches = [latent(24, 128, 64, [3000, 1300, 64, n], torch.bfloat16) for n in (1, 2)]
    wanted = [ops.mla_decode(**args) for args in batches]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in batches], [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(ops.mla_decode(**batches[i]))
    torch.cuda.synchronize()
    for want, all_of_one in zip(wanted, results, strict=True):
        for got in all_of_one:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_unaligned_tensors_are_rejected():
    args = latent(4, 64, 0, [5, 20], torch.bfloat16, page=16)
    cache = args["cache"]
    room = torch.zeros(cache.size(0), 16, 68, dtype=cache.dtype, device="cuda")
    message = r"zebra::mla_decode: cache must be 16-byte aligned with strides that are multiples"
    with pytest.raises(RuntimeError, match=message):
        ops.mla_decode(**args | {"cache": room[:, :, 2:66]})
    weight = torch.zeros(2 * 16 * 64 + 1, dtype=cache.dtype, device="cuda")[1:].view(32, 64)
    weighted = {"q": args["q"][..., :8], "kv_b_weight": weight, "num_kv_heads": 2}
    message = r"zebra::mla_decode: kv_b_weight must be 16-byte aligned with strides that are multi"
    with pytest.raises(RuntimeError, match=message):
        ops.mla_decode(**args | weighted)
    q = torch.zeros(2, 1, 4, 65, dtype=cache.dtype, device="cuda")[..., 1:]
    message = r"zebra::mla_decode: q must be 4-byte aligned with strides that are multiples of 2"
    with pytest.raises(RuntimeError, match=message):
        ops.mla_decode(**args | {"q": q})


@pytest.mark.skipif(_extension.bindings() is None, reason="zebra._C was not built")
def test_tiles_of_the_8b_model():
    from zebra import _C

    shape = {"batch": 64, "rows": 32, "rank": 160, "rope": 64, "max_tokens": 8192}
    c = _C.select_config("mla_decode", **shape)
    assert (c["stage"], c["groups"], c["streams"], c["slots"], c["ctas"]) == (32, 2, 4, 2, 128)
    c = _C.select_config("mla_decode", **shape, tma=True)
    assert (c["stage"], c["halves"], c["streams"], c["slots"], c["merge_parts"]) == (64, 2, 2, 2, 5)
    with pytest.raises(ValueError, match="ranks up to 256"):
        _C.select_config("mla_decode", **shape | {"rank": 512})


@pytest.mark.skipif(_extension.bindings() is None, reason="zebra._C was not built")
def test_tiles_of_deepseek():
    from zebra import _C

    shape = {"batch": 64, "rows": 128, "rank": 512, "rope": 64, "max_tokens": 8192}
    c = _C.select_config("mla_decode", **shape, tma=True)
    assert (c["rank"], c["stage"], c["groups"], c["slots"], c["ctas"]) == (512, 64, 8, 2, 64)
