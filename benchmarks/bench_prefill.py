"""Prefill: latent attention from the input norm to the output projection, its parts, the parts of a
Mamba2 layer, and whole models.

The peer of latent attention is eager PyTorch in the form of published code around the same
attention library: rotation by many operations in the activation dtype, slices assigned to new
tensors, KV heads repeated, F.scaled_dot_product_attention.  Whole models are timed with ssd_scan by
its kernel and by its composite.  One shape: ``--only "'model': '8b', 'B': 8,"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness import Case, Inputs, main
from torch import Tensor

import zebra
from zebra import ops
from zebra.layers import Mamba2Mixer, MultiheadLatentAttention, RMSNorm, RotaryEmbedding

EAGER = "eager glue, SDPA"
BF16 = torch.bfloat16
# hidden, heads, KV heads, R, Dn, E, Dv, Rq
MLA = {
    "1b": (2048, 32, 8, 128, 32, 32, 64, 1344),
    "3b": (3072, 24, 8, 128, 64, 64, 128, 1536),
    "8b": (4096, 32, 8, 160, 64, 64, 128, 2048),
}
# hidden, heads, head dimension, state size, KV heads
MAMBA = {"1b": (2048, 32, 64, 64, 8), "3b": (3072, 24, 128, 128, 8), "8b": (4096, 32, 128, 128, 8)}
LAYOUTS = {"1b": "1b-4mla-12m2", "3b": "3b-6mla-22m2", "8b": "8b-8mla-24m2"}


class Module(torch.nn.Module):
    """Input norm and latent attention, by zebra or by eager glue, on the same weights."""

    def __init__(self, model: str) -> None:
        super().__init__()
        D, H, G, R, Dn, E, Dv, Rq = MLA[model]
        yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0}
        rotary = RotaryEmbedding(E, 32768, yarn | {"original_max_position_embeddings": 8192})
        self.norm = RMSNorm(D)
        self.mla = MultiheadLatentAttention(D, H, G, R, Dn, E, Dv, rotary, q_lora_rank=Rq)

    def forward(self, x: Tensor) -> Tensor:
        return self.mla(self.norm(x))

    def eager_norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norm.weight, self.norm.eps)

    def eager_attention(self, q: Tensor, c: Tensor, k_rope: Tensor, kv: Tensor) -> Tensor:
        """q [B, T, H * d], c and k_rope as projected, kv expanded -> [B, T, H * Dv]."""
        m, (B, T, _) = self.mla, q.shape
        H, G, Dn, E = m.num_heads, m.num_kv_heads, m.qk_nope_head_dim, m.qk_rope_head_dim
        q_nope, q_rope = q.view(B, T, H, Dn + E).transpose(1, 2).split([Dn, E], dim=-1)
        k_rope = k_rope.view(B, T, 1, E).transpose(1, 2)
        k_nope, v = kv.view(B, T, G, -1).transpose(1, 2).split([Dn, m.v_head_dim], dim=-1)
        cos, sin = (torch.cat((t[:T], t[:T]), -1).to(q.dtype) for t in m.rotary.tables(q.device))
        q_rope, k_rope = (_rotate_eager(t, cos, sin) for t in (q_rope, k_rope))
        query = q.new_empty(B, H, T, Dn + E)
        query[..., :Dn], query[..., Dn:] = q_nope, q_rope
        key = q.new_empty(B, H, T, Dn + E)
        key[..., :Dn], key[..., Dn:] = _repeat_kv(k_nope, H // G), k_rope
        o = F.scaled_dot_product_attention(
            query, key, _repeat_kv(v, H // G), is_causal=True, scale=m.softmax_scale
        )
        return o.transpose(1, 2).reshape(B, T, -1)

    def eager(self, x: Tensor) -> Tensor:
        m = self.mla
        x = self.eager_norm(x)
        q = m.q_b_proj(m.q_a_proj(x))
        c, k_rope = m.kv_a_proj_with_mqa(x).split([m.kv_lora_rank, m.qk_rope_head_dim], dim=-1)
        return m.out_proj(self.eager_attention(q, c, k_rope, m.kv_b_proj(c)))


def _rotate_eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs brought apart, then the halves rotated, as published code does."""
    B, H, T, E = x.shape
    x = x.view(B, H, T, E // 2, 2).transpose(4, 3).reshape(B, H, T, E)
    half = torch.cat((-x[..., E // 2 :], x[..., : E // 2]), dim=-1)
    return x * cos + half * sin


def _repeat_kv(x: Tensor, n: int) -> Tensor:
    B, G, T, d = x.shape
    return x[:, :, None].expand(B, G, n, T, d).reshape(B, G * n, T, d)


def made(build: Callable[[], torch.nn.Module], device: str, dtype: torch.dtype) -> Any:
    """A module on a device with matrices of unit gain."""
    with torch.device(device):
        module = build()
    for name, p in module.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.size(1) ** -0.5)
        p.requires_grad_("norm" not in name)
    return module.to(dtype)


def case(op: str, model: str, B: int, T: int, dtype: torch.dtype, **fields: Any) -> Case:
    shape = {"model": model, "B": B, "T": T}
    return Case(op=op, shape=shape, dtype=dtype, **{"max_error": 3e-2} | fields)


def module_case(model: str, B: int, T: int, dtype: torch.dtype, grad: bool) -> Case:
    D, H, G, R, Dn, E, Dv, Rq = MLA[model]

    def make(device: str) -> Inputs:
        x = torch.randn(B, T, D, dtype=dtype, device=device)
        return {"m": made(lambda: Module(model), device, dtype), "x": x, "dy": torch.randn_like(x)}

    def run(fn: Callable[[Module, Tensor], Tensor], i: Inputs) -> list[Tensor]:
        if not grad:
            return [fn(i["m"], i["x"])]
        with torch.enable_grad():
            x = i["x"].detach().requires_grad_()
            weights = [p for p in i["m"].parameters() if p.requires_grad]
            return list(torch.autograd.grad(fn(i["m"], x), [x, *weights], i["dy"]))

    def truth(i: Inputs) -> list[Tensor]:
        wide = made(lambda: Module(model), i["x"].device.type, torch.float32)
        wide.load_state_dict(i["m"].state_dict())
        inputs = {k: v.float() for k, v in i.items() if k != "m"} | {"m": wide}
        return run(Module.eager, inputs)

    weights = D * (Rq + R + E) + Rq * H * (Dn + E) + R * G * (Dn + Dv) + H * Dv * D
    flops = 2 * B * T * weights + B * H * T * (T + 1) * (Dn + E + Dv)
    attention = B * H * T * (T + 1) * (Dn + E + Dv)
    return case(
        "mla prefill fwd+bwd" if grad else "mla prefill", model, B, T, dtype,
        bytes=(2 * B * T * D + weights) * dtype.itemsize * (3 if grad else 1),
        flops=3 * flops + attention // 2 if grad else flops,
        make=make,
        impls={"zebra": lambda i: run(Module.forward, i), EAGER: lambda i: run(Module.eager, i)},
        truth=truth,
    )  # fmt: skip


def part_cases(model: str, B: int, T: int, dtype: torch.dtype) -> list[Case]:
    """The parts of the forward pass, each from ready inputs."""
    D, H, G, R, Dn, E, Dv, Rq = MLA[model]
    n, size = B * T, dtype.itemsize

    def make(device: str) -> Inputs:
        m = made(lambda: Module(model), device, dtype)
        x = torch.randn(B, T, D, dtype=dtype, device=device)
        positions = torch.arange(T, device=device).expand(B, T)
        q, latent = m.mla._project(x, positions, None, None)
        kv = m.mla.kv_b_proj(latent[..., :R])
        o = torch.randn(B, T, H * Dv, dtype=dtype, device=device)
        return {"m": m, "x": x, "positions": positions, "q": q, "latent": latent, "kv": kv, "o": o}

    def project(i: Inputs) -> list[Tensor]:
        return list(i["m"].mla._project(i["x"], i["positions"], None, None))

    def products(i: Inputs) -> list[Tensor]:
        m = i["m"].mla
        return [m.q_b_proj(m.q_a_proj(i["x"])), m.kv_a_proj_with_mqa(i["x"])]

    def attend(i: Inputs) -> list[Tensor]:
        kv = i["kv"].unflatten(-1, (G, -1))
        scale = i["m"].mla.softmax_scale
        return [ops.mla_attention(i["q"], kv, i["latent"][..., R:], scale)[0]]

    def rotated(i: Inputs) -> list[Tensor]:
        """The eager glue and its attention; q and k are rotated once more than they should be."""
        q, latent = i["q"].flatten(2), i["latent"]
        o = i["m"].eager_attention(q, latent[..., :R], latent[..., R:], i["kv"])
        return [o.unflatten(-1, (H, Dv))]

    def one(part: str, moved: int, flops: int, **impls: Callable[[Inputs], list[Tensor]]) -> Case:
        named = {k.replace("_", " "): fn for k, fn in impls.items()}
        return case(
            f"mla prefill: {part}", model, B, T, dtype, bytes=moved * size, flops=flops,
            make=make, impls=named, truth=impls["zebra"],
        )  # fmt: skip

    weights = D * (Rq + R + E) + Rq * H * (Dn + E)
    wide = H * (Dn + E)
    return [
        one("norm", 2 * n * D, 0, zebra=lambda i: [i["m"].norm(i["x"])]),
        one("project", n * (D + wide + R + E) + weights, 2 * n * weights, zebra=project),
        one("its products", n * (D + wide + R + E) + weights, 2 * n * weights, zebra=products),
        one("kv_b", n * (R + G * (Dn + Dv)), 2 * n * R * G * (Dn + Dv),
            zebra=lambda i: [i["m"].mla.kv_b_proj(i["latent"][..., :R])]),
        one("attention", n * (wide + H * Dv + G * (Dn + Dv) + E),
            B * H * T * (T + 1) * (Dn + E + Dv), zebra=attend),
        one("eager glue and attention", n * (wide + H * Dv + G * (Dn + Dv) + E),
            B * H * T * (T + 1) * (Dn + E + Dv), zebra=rotated),
        one("out_proj", n * (H * Dv + D) + H * Dv * D, 2 * n * H * Dv * D,
            zebra=lambda i: [i["m"].mla.out_proj(i["o"])]),
    ]  # fmt: skip


def mamba_cases(model: str, B: int, T: int, dtype: torch.dtype) -> list[Case]:
    """The parts of a Mamba2 layer, each from ready inputs; ssd_scan by kernel and by composite."""
    D, H, P, N, G = MAMBA[model]
    n, size = B * T, dtype.itemsize
    conv, inner = G * (P + N) + H * N, H * P

    def make(device: str) -> Inputs:
        m = made(lambda: Mamba2Mixer(D, H, P, N, G), device, dtype)
        x = torch.randn(B, T, D, dtype=dtype, device=device)
        return {"m": m, "x": x, "zxbcdt": m.in_proj(x)}

    def convolve(i: Inputs) -> Tensor:
        weight, bias, _ = i["m"]._weights(dtype)
        return ops.causal_conv1d(i["zxbcdt"][..., inner : inner + conv], weight, bias)[0]

    def scan(i: Inputs) -> list[Tensor]:
        m, row = i["m"], i["zxbcdt"]
        z, xbc, dt = row.split([inner, conv, H], dim=-1)
        x, b, c = xbc.split([G * P, G * N, H * N], dim=-1)
        args = {
            "x": x.unflatten(-1, (G, P)), "dt": dt, "A": m._A(), "B": b.unflatten(-1, (G, N)),
            "C": c.unflatten(-1, (H, N)), "D": m.D.float(), "z": z.unflatten(-1, (H, P)),
            "dt_bias": m.dt_bias.float(), "norm_weight": m.norm.weight,
        }  # fmt: skip
        return [ops.ssd_scan(**args)[0]]

    def by_composite(i: Inputs) -> list[Tensor]:
        with composite_scan():
            return scan(i)

    def one(part: str, moved: int, flops: int, **impls: Callable[[Inputs], list[Tensor]]) -> Case:
        return case(
            f"mamba2 prefill: {part}", model, B, T, dtype, bytes=moved * size, flops=flops,
            make=make, impls=impls, truth=impls.get("composite", impls["zebra"]),
        )  # fmt: skip

    width = inner + conv + H
    impls = {"zebra": scan} | ({"composite": by_composite} if has_composite_scan() else {})
    return [
        one("in_proj", n * (D + width) + D * width, 2 * n * D * width,
            zebra=lambda i: [i["m"].in_proj(i["x"])]),
        one("conv", 2 * n * conv, 0, zebra=lambda i: [convolve(i)]),
        one("ssd_scan", n * (width + inner), n * H * (128 * (N + P) + 4 * N * P), **impls),
        one("out_proj", n * (inner + D) + D * inner, 2 * n * D * inner,
            zebra=lambda i: [i["m"].out_proj(i["zxbcdt"][..., :inner])]),
    ]  # fmt: skip


def has_composite_scan() -> bool:
    """Whether ssd_scan has a kernel with a composite beside it: on a GPU."""
    return torch.cuda.is_available()


def composite_scan() -> Any:
    """Serve ssd_scan of the layers by its composite, as before there was a kernel."""

    def scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, norm_weight=None, initial_state=None,
             cu_seqlens=None, dt_softplus=True, norm_eps=1e-5):  # fmt: skip
        return torch.ops.zebra._ssd_scan_composite(
            x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state, cu_seqlens, dt_softplus,
            norm_eps,
        )  # fmt: skip

    return mock.patch.object(ops, "ssd_scan", scan)


def model_case(model: str, B: int, T: int, dtype: torch.dtype, layers: int | None = None) -> Case:
    """Hidden states of all tokens and the logits of the last, random weights."""
    changes = {} if layers is None else {"num_hidden_layers": layers, "vocab_size": 512}
    config = zebra.ZebraConfig.preset(LAYOUTS[model], max_position_embeddings=131072)
    if layers is not None:
        config.update(changes | {"layer_types": ["mla", "mamba2"][:layers]})
    D, size = config.hidden_size, dtype.itemsize

    def make(device: str) -> Inputs:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                m = zebra.ZebraForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        return {"m": m, "ids": torch.randint(0, config.vocab_size, (B, T), device=device)}

    def run(i: Inputs) -> list[Tensor]:
        return [i["m"](input_ids=i["ids"], use_cache=False, logits_to_keep=1).logits]

    def before(i: Inputs) -> list[Tensor]:
        with composite_scan():
            return run(i)

    with torch.device("meta"):
        meta = zebra.ZebraForCausalLM(config)
    body = sum(p.numel() for p in meta.model.layers.parameters())
    _, H, _, _, Dn, E, Dv, _ = MLA[model]
    mla = config.layer_types.count("mla")
    attention = mla * B * H * T * (T + 1) * (Dn + E + Dv)
    impls = {"zebra": run}
    if has_composite_scan():
        impls["zebra, ssd_scan composite"] = before
    return case(
        "model prefill", model, B, T, dtype,
        bytes=(body + 2 * B * T * D) * size, flops=2 * B * T * body + attention,
        make=make, impls=impls, truth=impls.get("zebra, ssd_scan composite", run),
        max_error=0.3,  # dozens of layers, each rounding differently, on random weights
        extra={"layout": LAYOUTS[model], "tokens": B * T},
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    shapes = [(8, 2048), (1, 32768)] if gpu else [(1, 128)]
    out: list[Case] = []
    for model in MLA if gpu else ("1b",):
        for B, T in shapes:
            out += [module_case(model, B, T, BF16, grad) for grad in (False, True)]
            out += part_cases(model, B, T, BF16)
            out += mamba_cases(model, B, T, BF16)
            out.append(model_case(model, B, T, BF16, None if gpu else 2))
    return out


if __name__ == "__main__":
    main(cases, __doc__)
