"""ssd_scan: with gate and norm, the recurrence alone, and forward + backward.

Peers where they are installed, on CUDA:

* mamba-ssm needs x and B repeated for every head, as hybrid models hand them to it, and the gate
  and norm after it.  In "ssd_scan" it is timed with both; in "ssd_scan core" its kernel alone, on
  tensors repeated beforehand.
* flash-linear-attention's simple_gla is the same recurrence with q = C, k = B, v = d x and log
  decay g = A d.  It is in "ssd_scan core" only, on v and g made and q and k repeated beforehand:
  less work than the others do.

"ssd_scan core" has no D, gate or norm.  Eager is the chunked form in PyTorch operations, chunks of
64 tokens.  One shape: ``--only "'zebra-8b', 'B': 8,"``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Case, Inputs, bare_package, main, peer
from torch import Tensor

from zebra import ops
from zebra.ops import reference
from zebra.ops.ssd import _chunked_scan

CHUNK = 64
LEAVES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "norm_weight")
CORE = ("x", "dt", "A", "B", "C", "dt_bias")
# name: heads, groups of x, B and C, head dimension, state size
LAYERS = {
    "zebra-1b": (32, (8, 8, 32), 64, 64),
    "zebra-3b": (24, (8, 8, 24), 128, 128),
    "zebra-8b": (32, (8, 8, 32), 128, 128),
    "mamba2-2.7b": (80, (80, 1, 1), 64, 128),
}
NORMED = ("zebra-1b", "zebra-3b", "zebra-8b")  # the norm of mamba2-2.7b spans its heads


def make(layer: str, batch: int, tokens: int, dtype: torch.dtype, device: str) -> Inputs:
    """Realistic inputs: A in [-16, -1], softplus(dt + dt_bias) around [1e-3, 0.1]."""
    H, (gx, gb, gc), P, N = LAYERS[layer]

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, dtype=dtype, device=device)

    step = torch.empty(H, device=device).uniform_(1e-3, 0.1)
    inputs = {
        "x": randn(gx, P),
        "dt": randn(H) / 2,
        "A": -torch.empty(H, device=device).uniform_(1, 16),
        "B": randn(gb, N),
        "C": randn(gc, N) / N**0.5,
        "D": torch.ones(H, device=device),
        "z": randn(H, P),
        "dt_bias": step.expm1().log(),
        "norm_weight": torch.ones(H * P, dtype=dtype, device=device),
        "dy": randn(H, P),
    }
    if layer not in NORMED:
        del inputs["norm_weight"]
    return inputs


def make_core(*args) -> Inputs:
    """The recurrence alone, and what its peers get ready made (``all_x`` ... ``v``, ``g``)."""
    i = {k: v for k, v in make(*args).items() if k in CORE}
    if i["x"].is_cuda:
        H = i["A"].size(0)
        for k in ("x", "B", "C"):
            i["all_" + k] = i[k].repeat_interleave(H // i[k].size(2), dim=2)
        d = F.softplus(i["dt"].float() + i["dt_bias"])
        i["g"] = i["A"] * d
        i["v"] = (i["all_x"] * d[..., None]).to(i["x"].dtype)
    return i


def zebra(**i: Tensor) -> Tensor:
    return ops.ssd_scan(**i)[0]


def eager(**i: Tensor) -> Tensor:
    given = dict.fromkeys((*LEAVES, "initial_state", "cu_seqlens")) | i
    return _chunked_scan(**given, dt_softplus=True, norm_eps=1e-5, chunk=CHUNK)[0]


def mamba_ssm(**i: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    H = i["A"].size(0)
    groups = max(i["B"].size(2), i["C"].size(2))  # one number of groups for B and C
    x = i["x"].repeat_interleave(H // i["x"].size(2), dim=2)
    B, C = (i[k].repeat_interleave(groups // i[k].size(2), dim=2) for k in ("B", "C"))
    y = mamba_chunk_scan_combined(
        x, i["dt"], i["A"], B, C, 256, D=i["D"], dt_bias=i["dt_bias"], dt_softplus=True
    )
    return reference.gated_norm(y, i["z"], i.get("norm_weight"), 1e-5).to(x.dtype)


def mamba_ssm_kernel(i: Inputs) -> list[Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    H = i["A"].size(0)
    one_group = i["B"].size(2) == i["C"].size(2)
    B, C = (i["B"], i["C"]) if one_group else (i["all_B"], i["all_C"])
    x = i["x"] if i["x"].size(2) == H else i["all_x"]
    bias = i["dt_bias"]
    y = mamba_chunk_scan_combined(x, i["dt"], i["A"], B, C, 256, dt_bias=bias, dt_softplus=True)
    return [y]


def simple_gla_kernel(i: Inputs) -> list[Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    return [chunk_simple_gla(i["all_C"], i["all_B"], i["v"], i["g"], scale=1.0)[0]]


def leaves(i: Inputs) -> Inputs:
    return {k: i[k] for k in LEAVES if k in i}


def forward(fn):
    return lambda i: [fn(**leaves(i))]


def gradients(fn):
    def run(i: Inputs) -> list[Tensor]:
        with torch.enable_grad():
            inputs = {k: v.detach().requires_grad_() for k, v in leaves(i).items()}
            y = fn(**inputs)
            return list(torch.autograd.grad(y, list(inputs.values()), i["dy"].to(y.dtype)))

    return run


def widest(i: Inputs) -> Inputs:
    """fp64; on a GPU fp32, because fp64 does not fit at those sizes."""
    wide = torch.float32 if i["x"].is_cuda else torch.float64
    return {k: v.to(wide) for k, v in i.items()}


def exact_forward(i: Inputs) -> list[Tensor]:
    """Eager, one batch row at a time: it needs many times the memory of its inputs."""
    time = ("x", "dt", "B", "C", "z")
    rows = []
    for b in range(i["x"].size(0)):
        row = {k: v[b : b + 1] if k in time else v for k, v in leaves(i).items()}
        rows.append(eager(**widest(row)))
    return [torch.cat(rows)]


def exact_gradients(i: Inputs) -> list[Tensor]:
    return gradients(eager)(widest(i))


def case(op: str, layer: str, batch: int, tokens: int, dtype: torch.dtype, impls: dict) -> Case:
    H, (gx, gb, gc), P, N = LAYERS[layer]
    core = gx * P + (gb + gc) * N + H  # elements of x, B, C, dt of a token
    state = 4 * batch * H * P * N
    scan = H * (2 * CHUNK * (N + P) + 4 * N * P)  # flops of a token
    both = H * (8 * CHUNK * N + 6 * CHUNK * P + 14 * N * P)
    elements, flops, truth = {
        "ssd_scan": (core + 2 * H * P, scan, exact_forward),  # and z, y
        "ssd_scan core": (core + H * P, scan, exact_forward),
        # Backward reads the inputs and dy and writes the gradients of the inputs.
        "ssd_scan fwd+bwd": (3 * core + 5 * H * P, both, exact_gradients),
    }[op]
    create = make_core if op == "ssd_scan core" else make
    return Case(
        op=op,
        shape={"layer": layer, "B": batch, "T": tokens},
        dtype=dtype,
        bytes=batch * tokens * elements * dtype.itemsize + state,
        flops=batch * tokens * flops,
        make=lambda device: create(layer, batch, tokens, dtype, device),
        impls=impls,
        truth=truth,
        max_error=1e-2 if dtype == torch.bfloat16 else 1e-4,
    )


def cases(device: str) -> list[Case]:
    """Model shapes: short and long sequences on a GPU, one sequence on the CPU."""
    cuda = device == "cuda"
    shapes = [(2, 8192), (8, 2048), (1, 32768), (4, 16384)] if cuda else [(1, 2048)]
    dtypes = (torch.bfloat16,) if cuda else (torch.bfloat16, torch.float32)
    scans = {"zebra": zebra, "eager": eager}
    kernels = {k: forward(f) for k, f in scans.items()}
    if cuda and (library := peer("mamba_ssm", "mamba-ssm")):
        bare_package("mamba_ssm")
        scans[library] = mamba_ssm
        kernels[library] = mamba_ssm_kernel
    if cuda and (library := peer("fla", "flash-linear-attention")):
        kernels[library] = simple_gla_kernel
    out = []
    for layer in LAYERS:
        for batch, tokens in shapes:
            for dtype in dtypes:
                shape = (layer, batch, tokens, dtype)
                out.append(case("ssd_scan", *shape, {k: forward(f) for k, f in scans.items()}))
                out.append(case("ssd_scan core", *shape, kernels))
                if batch * tokens <= 16384:  # the memory of eager's gradients
                    impls = {k: gradients(f) for k, f in scans.items()}
                    out.append(case("ssd_scan fwd+bwd", *shape, impls))
    return out


if __name__ == "__main__":
    main(cases, __doc__)
