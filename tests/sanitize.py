"""Every CUDA kernel on small, awkward shapes, for compute-sanitizer (no pytest, few launches).

for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --error-exitcode 1 python tests/sanitize.py; done
"""

import itertools

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


if __name__ == "__main__":
    rms_norm()
    causal_conv1d()
    torch.cuda.synchronize()
    print("every kernel ran")
