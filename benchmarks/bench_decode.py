"""One decoding step of whole models at 8192 cached tokens, and the share of each of its parts.

Random weights, every sequence equally long.  A part is that part of all layers, one after another
in one CUDA graph: latent attention with its projections, and its attention alone; Mamba2 mixers,
and their step alone; MLPs; final norm and output head.  The peer is the same step with its products
by F.linear, norms and activations by their modules.  One model:
``--only "'model': '8b', 'B': 1,"``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from harness import Case, Inputs, main
from torch import Tensor, nn

import zebra
from zebra import ops
from zebra.cache import HybridCache, PagedLayer, PagedSpec, StateSpec
from zebra.layers import linear
from zebra.layers.linear import decode_linear

BF16 = torch.bfloat16
LAYOUTS = {"1b": "1b-4mla-12m2", "3b": "3b-6mla-22m2", "8b": "8b-8mla-24m2"}
PLAIN = "products by F.linear"
CACHED = 8192

Step = Callable[[Inputs, HybridCache], Tensor]


def config_of(model: str) -> zebra.ZebraConfig:
    return zebra.ZebraConfig.preset(LAYOUTS[model], max_position_embeddings=131072)


@functools.lru_cache(maxsize=1)
def made(model: str, merged: bool, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights that keep the size of what passes through them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            m = zebra.ZebraForCausalLM(config_of(model))
    finally:
        torch.set_default_dtype(before)
    for name, p in m.named_parameters():
        if name.endswith(("A_log", "D", "dt_bias")):
            p.data = p.data.float()  # as checkpoints are loaded
        elif p.dim() == 2:
            nn.init.normal_(p, std=p.size(1) ** -0.5)
    if merged:
        m.merge_queries()
    return m.eval().requires_grad_(False)


def filled(m: Any, B: int, length: int) -> HybridCache:
    """A cache of B sequences of `length` random tokens, the same at every call."""
    torch.manual_seed(1)
    cache = m.new_cache(B, length + 1)
    for slot in range(B):
        cache.reserve(slot, length + 1)
    cache.lengths, cache.seq_lens[:] = [length] * B, length
    for layer in cache.layers:
        if isinstance(layer, PagedLayer):
            layer.pages.normal_()
        else:
            layer.conv_state.normal_()
            layer.ssm_state.normal_(std=0.1)
    return cache


def stores(i: Inputs, cache: HybridCache, kind: str) -> Iterator[tuple[Any, Any]]:
    """The decoder layers of one kind, each with its part of the cache."""
    for layer, store in zip(i["m"].model.layers, cache.layers, strict=True):
        if layer.kind == kind:
            yield layer, store


def whole(i: Inputs, cache: HybridCache) -> Tensor:
    return i["m"].step(i["ids"], cache, i["rows"])


def mixers(kind: str) -> Step:
    def run(i: Inputs, cache: HybridCache) -> Tensor:
        hidden = i["hidden"]
        for layer, store in stores(i, cache, kind):
            hidden = layer.step_mixer(hidden, i["rows"].positions, i["rows"], store)
        return hidden

    return run


def attention(i: Inputs, cache: HybridCache) -> Tensor:
    q, rows = i["q"], i["rows"]
    for layer, store in stores(i, cache, "mla"):
        o = layer.mla._absorbed(q, store.pages, rows.block_table, rows.seq_lens)
    return o


def states(i: Inputs, cache: HybridCache) -> Tensor:
    for layer, store in stores(i, cache, "mamba2"):
        m = layer.mamba
        weights = m._weights(i["zxbcdt"].dtype)
        y = ops.mamba2_step(
            i["zxbcdt"], store.conv_state, store.ssm_state, *weights[:2], m.dt_bias, m.A_log,
            m.D, weights[2], m.num_kv_heads, i["rows"].slots, m.norm_eps, A_is_log=True,
        )  # fmt: skip
    return y


def mlps(i: Inputs, cache: HybridCache) -> Tensor:
    hidden = i["hidden"]
    for layer in i["m"].model.layers:
        hidden = layer.mlp.step(hidden, layer.post_attention_layernorm)
    return hidden


def head(i: Inputs, cache: HybridCache) -> Tensor:
    return decode_linear(i["m"].lm_head, i["hidden"][:, 0], i["m"].model.norm)


def plainly(step: Step) -> Step:
    def run(i: Inputs, cache: HybridCache) -> Tensor:
        with mock.patch.object(linear, "MAX_DECODE_ROWS", 0):
            return step(i, cache)

    return run


def step_case(
    part: str, step: Step, model: str, B: int, moved: int, products: int, merged: bool
) -> Case:
    """A step or a part: `moved` bytes of cache and states, `products` weights."""
    config = config_of(model)

    def make(device: str) -> Inputs:
        m = made(model, merged, BF16, device)
        first = m.model.layers[config.layer_types.index("mla")].mla
        mamba = m.model.layers[config.layer_types.index("mamba2")].mamba
        hidden = torch.randn(B, 1, config.hidden_size, dtype=BF16, device=device)
        heads = (first.num_heads, first.qk_nope_head_dim + first.qk_rope_head_dim)
        caches = {name: filled(m, B, CACHED) for name in ("truth", "zebra", PLAIN)}
        for cache in caches.values():
            rows = cache.extend([1] * B)  # the same of each
        return {
            "m": m,
            "caches": caches,  # a step changes its cache: one for each who runs it
            "rows": rows,
            "ids": torch.randint(0, config.vocab_size, (B,), device=device),
            "hidden": hidden,
            "q": torch.randn(B, 1, *heads, dtype=BF16, device=device),
            "zxbcdt": mamba.in_proj(hidden[:, 0]),
        }

    def named(name: str, run: Step) -> Callable[[Inputs], list[Tensor]]:
        return lambda i: [run(i, i["caches"][name])]

    impls = {"zebra": named("zebra", step), PLAIN: named(PLAIN, plainly(step))}
    return Case(
        op=f"decode step{part}", shape={"model": model, "B": B, "cached": CACHED}, dtype=BF16,
        bytes=2 * products + moved, flops=2 * B * products, make=make, impls=impls,
        truth=named("truth", plainly(step)),
        max_error=0.3,  # dozens of layers, each rounding differently, on random weights
        extra={"layout": LAYOUTS[model], "queries": "merged" if merged else "in two projections"},
    )  # fmt: skip


def model_cases(model: str, B: int, merged: bool) -> list[Case]:
    config = config_of(model)
    with torch.device("meta"):
        meta = zebra.ZebraForCausalLM(config)
        if merged:
            meta.merge_queries()

    def weights(*names: str) -> int:
        found = [m for n, m in meta.named_modules() if n.split(".")[-1] in names]
        return sum(p.numel() for m in found for p in m.parameters())

    specs = config.cache_specs()
    latents = sum(2 * s.width for s in specs if isinstance(s, PagedSpec)) * B * CACHED
    state = sum(
        8 * s.num_heads * s.head_dim * s.state_size + 4 * s.conv_dim * (s.conv_width - 1)
        for s in specs
        if isinstance(s, StateSpec)
    )
    name = ", merged queries" if merged else ""
    parts: list[tuple[str, Step, int, int]] = [
        (name, whole, latents + B * state, weights("layers", "lm_head")),
        (f": latent attention{name}", mixers("mla"), latents, weights("mla")),
        (": attention alone", attention, latents, weights("kv_b_proj")),
        (": Mamba2 mixers", mixers("mamba2"), B * state, weights("mamba")),
        (": mamba2_step alone", states, B * state, 0),
        (": MLPs", mlps, 0, weights("mlp")),
        (": head", head, 0, weights("lm_head")),
    ]
    if merged:
        parts = parts[:2]  # the others are the same
    return [step_case(*part[:2], model, B, *part[2:], merged) for part in parts]


def cases(device: str) -> list[Case]:
    """Whole models, so on a GPU only."""
    if device != "cuda":
        return []
    kinds = [(m, B, merged) for m in LAYOUTS for merged in (False, True) for B in (1, 48)]
    return [case for kind in kinds for case in model_cases(*kind)]


if __name__ == "__main__":
    main(cases, __doc__)
