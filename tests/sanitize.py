"""Every CUDA kernel on small, awkward shapes, for compute-sanitizer (no pytest, few launches).

for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --error-exitcode 1 python tests/sanitize.py; done

A name runs one kernel: ``python tests/sanitize.py ssd_scan``.  racecheck wants the Hopper kernels
built with CUDAFLAGS=-DZEBRA_RACECHECK (csrc/common/sm90/ptx.cuh): it follows barriers by thread.
How it counts barriers is in docs/kernels/mla_decode.md.  ThreadSanitizer sees both of mla_decode's
kernels in ctest.
"""

import itertools
import os
import sys

import torch

from zebra import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm() -> None:
    for dtype, shape in itertools.product(DTYPES, ((3, 8), (5, 1000), (2, 4096), (2, 40000))):
        x, r = (torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in "xr")
        w = torch.ones(shape[-1], dtype=dtype, device="cuda", requires_grad=True)
        y, s = ops.rms_norm(x, w, r)
        (y + s).sum().backward()
        ops.rms_norm(x.detach()[:, 1:], torch.ones_like(w[1:]))  # misaligned


def causal_conv1d() -> None:
    packed = torch.tensor([0, 0, 5, 6, 6, 70], dtype=torch.int32, device="cuda")
    cases = itertools.product(DTYPES, (2, 4), ((2, 1, 24), (2, 67, 130)), (False, True))
    for dtype, width, (batch, tokens, channels), is_packed in cases:
        if is_packed:
            batch, tokens, sequences = 1, 70, 5
        else:
            sequences = batch
        wide = torch.randn(batch, tokens, channels + 8, dtype=dtype, device="cuda")
        for x in (wide[..., :channels], wide[..., 1 : channels + 1]):
            x = x.detach().requires_grad_()
            w = torch.randn(channels, width, dtype=dtype, device="cuda", requires_grad=True)
            b = torch.randn(channels, dtype=dtype, device="cuda", requires_grad=True)
            state = torch.randn(sequences, channels, width - 1, dtype=dtype, device="cuda")
            state.requires_grad_()
            y, last = ops.causal_conv1d(x, w, b, state, packed if is_packed else None)
            (y.sum() + last.sum()).backward()
            index = torch.tensor([1, -1], dtype=torch.int32, device="cuda")[: x.size(1)]
            with torch.no_grad():
                token = x[0, : len(index)]
                ops.causal_conv1d_step(token, last.repeat(2, 1, 1), w, b, state_indices=index)


def ssd_scan() -> None:
    packed = torch.tensor([0, 0, 5, 6, 6, 70], dtype=torch.int32, device="cuda")
    sizes = itertools.product(DTYPES[1:], (64, 128), (64, 128), (False, True), (False, True))
    for dtype, P, N, is_packed, is_full in sizes:
        batch, tokens, sequences, H, G = (1, 70, 5, 3, 1) if is_packed else (2, 67, 2, 4, 2)

        def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device="cuda")

        row = randn(batch, tokens, G * (P + N) + 8)  # x and B in place, 16 bytes in
        x, B = row[..., 8:].split([G * P, G * N], dim=-1)
        args = {
            "x": x.unflatten(-1, (G, P)),
            "dt": randn(batch, tokens, H),
            "A": -randn(H, dtype=torch.float32).exp(),
            "B": B.unflatten(-1, (G, N)),
            "C": randn(batch, tokens, H, N),
        }
        if is_full:
            args["D"], args["dt_bias"] = randn(H), randn(H)
            args["z"], args["norm_weight"] = randn(batch, tokens, H, P), randn(H * P)
            args["initial_state"] = randn(sequences, H, P, N, dtype=torch.float32)
        for portable in ("0", "1"):
            os.environ["ZEBRA_PORTABLE"] = portable
            ops.ssd_scan(**args, cu_seqlens=packed if is_packed else None)
    del os.environ["ZEBRA_PORTABLE"]


def mla_project() -> None:
    # H, Dn, E, Rq, R, norms: vectors; odd widths; nothing but rotated columns
    shapes = ((3, 8, 16, 24, 40, False), (2, 3, 6, 5, 7, True), (1, 0, 2, 4, 1, False))
    for dtype, (H, nope, E, Rq, R, norms) in itertools.product(DTYPES, shapes):

        def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)

        for batch, tokens in ((1, 1), (1, 9), (2, 67)):
            x, table = randn(batch, tokens, 16), randn(70, E // 2, dtype=torch.float32).detach()
            args = [x, randn(Rq, 16), randn(H * (nope + E), Rq), randn(R + E, 16), table, table]
            positions = torch.arange(tokens, device="cuda").expand(batch, -1)
            args += [positions if tokens > 1 else positions.int(), H]
            norm = [randn(Rq), randn(R)] if norms else [None, None]
            q, latent = ops.mla_project(*args, *norm)
            (q.sum() + latent.sum()).backward()
            with torch.no_grad():
                cache = torch.zeros(3, 64, R + E, dtype=dtype, device="cuda")
                slots = torch.arange(-1, batch * tokens - 1, device="cuda").view(batch, tokens)
                ops.mla_project_append(*args, cache, slots, *norm)


def mla_attention() -> None:
    packed = torch.tensor([0, 0, 5, 6, 6, 70], dtype=torch.int32, device="cuda")
    # H, G, Dn, E, Dv
    sizes = ((4, 2, 8, 8, 16), (3, 1, 24, 8, 32), (2, 2, 0, 16, 16), (2, 1, 16, 0, 16))
    for dtype, (H, G, nope, E, Dv) in itertools.product(DTYPES[1:], sizes):
        for batch, tokens, cu_seqlens in ((1, 1, None), (3, 67, None), (1, 70, packed)):

            def randn(
                *shape: int, dtype: torch.dtype = dtype, row: tuple[int, int] = (batch, tokens)
            ) -> torch.Tensor:
                return torch.randn(*row, *shape, dtype=dtype, device="cuda")

            wide = randn(G * (nope + Dv) + E + 8)  # kv and k_rope in place, 16 bytes in
            _, kv, k_rope = wide.split([8, G * (nope + Dv), E], dim=-1)
            leaves = [randn(H, nope + E), kv.unflatten(-1, (G, -1)), k_rope]
            leaves = [t.detach().requires_grad_() for t in leaves]
            ops.mla_attention(*leaves, 0.2, cu_seqlens)[0].sum().backward()


def mla_decode() -> None:
    # H, R, E: an instance with q in registers, one with q in shared memory, a padded one
    shapes = ((24, 128, 64), (32, 192, 64), (5, 80, 8))
    cases = itertools.product(DTYPES[1:], shapes, (1, 3), (16, 64), (0, 64))
    for dtype, (H, R, E), tokens, page, split in cases:
        lengths = torch.tensor([0, 1, 300, 64, tokens], dtype=torch.int32, device="cuda")
        pages = -(-300 // page)
        table = torch.randperm(5 * pages, device="cuda").view(5, pages).int()
        cache = torch.randn(5 * pages, page, R + E, dtype=dtype, device="cuda")
        wide = torch.randn(5, tokens, H, R + E + 2, dtype=dtype, device="cuda")
        for q in (wide[..., : R + E].contiguous(), wide[..., 2:]):  # 16-byte and 4-byte aligned
            for portable in ("0", "1"):
                os.environ["ZEBRA_PORTABLE"] = portable
                ops.mla_decode(q, cache, table, lengths, 0.1, kv_lora_rank=R, split_size=split)
                narrow = q[..., : 24 + E]
                weight = torch.randn(H * (24 + 40), R, dtype=dtype, device="cuda")
                ops.mla_decode(narrow, cache, table, lengths, 0.1, weight, H, split_size=split)
    del os.environ["ZEBRA_PORTABLE"]


def mamba2_step() -> None:
    # H, P, N, rows: of the last two several heads share a multiprocessor, with few warps each
    shapes = ((4, 24, 24, 3), (4, 24, 64, 3), (4, 24, 128, 3), (32, 64, 64, 42), (8, 128, 128, 70))
    for dtype, (H, P, N, rows), width in itertools.product(DTYPES, shapes, (2, 4)):
        G = 2
        channels = G * (P + N) + H * N
        index = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device="cuda")
        index[rows // 2] = -1
        for state_dtype in {torch.float32, dtype}:

            def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(shape, dtype=dtype, device="cuda")

            ops.mamba2_step(
                randn(rows, H * P + channels + H),
                randn(rows, channels, width - 1),
                randn(rows, H, P, N, dtype=state_dtype),
                randn(channels, width),
                randn(channels),
                randn(H),
                randn(H, dtype=torch.float32),
                randn(H),
                randn(H * P),
                G,
                index,
                A_is_log=True,
            )


def linear_decode() -> None:
    for dtype, rows, (N, K) in itertools.product(
        DTYPES, (1, 3, 12, 20, 40, 70), ((96, 64), (200, 264), (9000, 136), (4096, 1024))
    ):
        x, w, up = (torch.randn(n, K, dtype=dtype, device="cuda") for n in (rows, N, N))
        g, r = torch.ones_like(x[0]), torch.randn(rows, N, dtype=dtype, device="cuda")
        ops.linear_decode(x, w)
        ops.linear_decode(x, w, g, r[0], r)
        ops.linear_decode(x, w, g, activation="swiglu", up_weight=up)


KERNELS = (
    rms_norm, causal_conv1d, ssd_scan, mamba2_step, linear_decode, mla_project, mla_attention,
    mla_decode,
)  # fmt: skip

if __name__ == "__main__":
    for kernel in KERNELS:
        if sys.argv[1:] in ([], [kernel.__name__]):
            kernel()
    torch.cuda.synchronize()
    print("every kernel ran")
