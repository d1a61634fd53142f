import pytest
import torch
from tolerances import factor

from zebra.cache import HybridCache, PagedSpec
from zebra.layers import MultiheadLatentAttention, RMSNorm, RotaryEmbedding
from zebra.layers.mla import ABSORBED_ROWS, _equal_work
from zebra.testing import assert_close

HIDDEN, HEADS, GROUPS, R, NOPE, E, DV = 48, 6, 2, 16, 24, 32, 40


def make(device: str = "cpu", **options) -> MultiheadLatentAttention:
    torch.manual_seed(2)
    rotary = RotaryEmbedding(
        E, 256, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                 "original_max_position_embeddings": 64}
    )  # fmt: skip
    options = {"q_lora_rank": 20} | options
    layer = MultiheadLatentAttention(HIDDEN, HEADS, GROUPS, R, NOPE, E, DV, rotary, **options)
    for name, p in layer.named_parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if "norm" in name else p.data.mul_(2)
    return layer.to(device)


def pages(batch: int, device: str, fill: float = 0.0, page_size: int = 4) -> HybridCache:
    cache = HybridCache(
        [PagedSpec(R + E)], batch, 40, page_size=page_size, dtype=torch.float32, device=device
    )
    cache.layers[0].pages.fill_(fill)
    return cache


def run_step(layer, cache, hidden, **options):
    rows = cache.extend([hidden.size(1)] * hidden.size(0))
    return layer.step(
        hidden,
        rows.positions,
        cache.layers[0].pages,
        rows.slot_mapping,
        rows.block_table,
        rows.seq_lens,
        **options,
    )


def run_forward(layer, cache, hidden, new_lens=None):
    lens = [hidden.size(1)] * hidden.size(0) if new_lens is None else new_lens
    rows = cache.extend(lens, packed=new_lens is not None)
    cu = torch.tensor([0, *lens], device=hidden.device).cumsum(0).int()
    return layer(
        hidden,
        rows.positions,
        None if new_lens is None else cu,
        cache=cache.layers[0].pages,
        slot_mapping=rows.slot_mapping,
        block_table=rows.block_table,
        prefix_lens=rows.prefix_lens,
        new_lens=rows.new_lens,
    )


def close(got: torch.Tensor, layer, hidden: torch.Tensor, eager: torch.Tensor, what: str) -> None:
    """``got`` is as near to the layer's fp64 output as its own full forward pass is."""
    copy = make(**layer_options(layer)).double()
    truth = copy(hidden.double().cpu())
    assert_close(got, truth, eager, factor("mla", hidden.dtype), what)


def layer_options(layer) -> dict:
    return {
        "q_lora_rank": None if layer.q_a_proj is None else layer.q_a_proj.out_features,
        "latent_norm": layer.kv_a_layernorm is not None,
    }


OPTIONS = [{}, {"q_lora_rank": None}, {"latent_norm": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_absorbed_step_equals_expanded_forward(device: str, options: dict) -> None:
    layer, hidden = make(device, **options), torch.randn(2, 13, HIDDEN, device=device)
    full = layer(hidden)
    for split in (1, 4, 12):
        # what no sequence has written must not be read
        cache = pages(2, device, fill=float("nan"))
        parts = [run_forward(layer, cache, hidden[:, :split])]
        parts += [run_step(layer, cache, hidden[:, t : t + 1]) for t in range(split, 13)]
        close(torch.cat(parts, 1), layer, hidden, full, f"split {split}")


@torch.no_grad()
def test_step_takes_several_tokens(device: str) -> None:
    layer, hidden = make(device), torch.randn(2, 13, HIDDEN, device=device)
    cache = pages(2, device, fill=float("nan"))
    parts = [run_step(layer, cache, hidden[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 13))]
    close(torch.cat(parts, 1), layer, hidden, layer(hidden), "steps of 5, 1, 7")


def test_the_form_follows_from_the_rows_of_the_published_shapes() -> None:
    for shape, rows in ABSORBED_ROWS.items():
        assert abs(_equal_work(*shape) - rows) <= 1, shape


@pytest.mark.parametrize("absorbed_rows", [0, 3, 17])
@torch.no_grad()
def test_chunked_forward_equals_one_shot(device: str, absorbed_rows: int) -> None:
    layer, hidden = make(device), torch.randn(2, 37, HIDDEN, device=device)
    layer.absorbed_rows = absorbed_rows
    cache = pages(2, device, fill=float("nan"))
    parts = [run_forward(layer, cache, hidden[:, a:b]) for a, b in ((0, 3), (3, 20), (20, 37))]
    close(torch.cat(parts, 1), layer, hidden, layer(hidden), "chunks")


@pytest.mark.parametrize("absorbed_rows", [0, 4, 100])
@torch.no_grad()
def test_ragged_chunks_equal_separate_sequences(device: str, absorbed_rows: int) -> None:
    layer = make(device)
    layer.absorbed_rows = absorbed_rows
    lengths, chunks = (11, 7), ((4, 0), (7, 7))
    sequences = [torch.randn(1, n, HIDDEN, device=device) for n in lengths]
    cache = pages(2, device, fill=float("nan"))
    got: list[list[torch.Tensor]] = [[], []]
    done = [0, 0]
    for lens in chunks:
        row = [s[:, d : d + n] for s, d, n in zip(sequences, done, lens, strict=True)]
        out = run_forward(layer, cache, torch.cat(row, 1), list(lens))
        for i, part in enumerate(out.split(list(lens), dim=1)):
            got[i].append(part)
            done[i] += lens[i]
    for parts, sequence in zip(got, sequences, strict=True):
        close(torch.cat(parts, 1), layer, sequence, layer(sequence), "ragged")


@torch.no_grad()
def test_packed_sequences_equal_separate_ones(device: str) -> None:
    layer = make(device)
    sequences = [torch.randn(1, n, HIDDEN, device=device) for n in (5, 1, 9)]
    cu_seqlens = torch.tensor([0, 5, 6, 15], dtype=torch.int32, device=device)
    packed = layer(torch.cat(sequences, 1), cu_seqlens=cu_seqlens)
    for got, sequence in zip(packed.split([5, 1, 9], dim=1), sequences, strict=True):
        close(got, layer, sequence, layer(sequence), "packed")


@torch.no_grad()
def test_padding_row_writes_nothing(device: str) -> None:
    layer, hidden = make(device), torch.randn(2, 1, HIDDEN, device=device)
    cache = pages(2, device)
    rows = cache.extend([1, 1])
    zero = torch.zeros_like(rows.seq_lens)
    before = cache.layers[0].pages[:-1].clone()
    layer.step(
        hidden,
        rows.positions,
        cache.layers[0].pages,
        torch.full_like(rows.slot_mapping, -1),
        rows.block_table,
        zero,
    )
    assert torch.equal(cache.layers[0].pages[:-1], before)


def test_every_weight_gets_a_gradient(device: str) -> None:
    layer = make(device, latent_norm=True)
    layer(torch.randn(2, 6, HIDDEN, device=device)).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_positions_shift_only_relatively(device: str) -> None:
    layer, hidden = make(device), torch.randn(1, 9, HIDDEN, device=device)
    positions = torch.arange(9, device=device)[None]
    with torch.no_grad():
        near, far = layer(hidden, positions), layer(hidden, positions + 50)
        scrambled = layer(hidden, positions.flip(1))
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-4)
    assert (near - scrambled).abs().max() > 1e-2


def test_autocast_runs_the_operators_in_bf16(device: str) -> None:
    layer, hidden = make(device), torch.randn(2, 9, HIDDEN, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = layer(hidden)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(hidden), rtol=0.1, atol=0.05)
    out.float().sum().backward()
    assert layer.q_a_proj.weight.grad.dtype == torch.float32


class Adapter(torch.nn.Module):
    """What peft makes of a layer: it shows the base layer's weight and adds a product."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, device=base.weight.device))
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2, device=base.weight.device))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.1 * (x @ self.down.t()) @ self.up.t()


PROJECTIONS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "out_proj"]


@pytest.mark.parametrize("options", [{}, {"latent_norm": True}], ids=str)
@pytest.mark.parametrize("names", [*([n] for n in PROJECTIONS), PROJECTIONS], ids=str)
def test_adapters_take_part(device: str, names: list[str], options: dict) -> None:
    layer, hidden = make(device, **options), torch.randn(2, 9, HIDDEN, device=device)
    merged = make(device, **options)
    for name in names:
        adapter = Adapter(getattr(layer, name))
        setattr(layer, name, adapter)
        getattr(merged, name).weight.data += 0.1 * (adapter.up @ adapter.down).detach()
    with torch.no_grad():
        want = merged(hidden)
        for absorbed_rows in (0, 20):
            layer.absorbed_rows = absorbed_rows
            cache = pages(2, device, fill=float("nan"))
            parts = [run_forward(layer, cache, hidden[:, a:b]) for a, b in ((0, 4), (4, 7))]
            parts += [run_step(layer, cache, hidden[:, t : t + 1]) for t in (7, 8)]
            torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-3, atol=1e-3)
    out = layer(hidden)
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
    out.square().sum().backward()
    for name in names:
        for p in getattr(layer, name).parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", [*PROJECTIONS[:4], "q_a_layernorm", "kv_a_layernorm"])
def test_hooks_are_called(name: str) -> None:
    layer, hidden = make(latent_norm=True), torch.randn(1, 5, HIDDEN)
    want = layer(hidden)
    seen: list[torch.Size] = []
    hook = getattr(layer, name).register_forward_hook(lambda m, x, y: seen.append(y.shape))
    torch.testing.assert_close(layer(hidden), want, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    hook.remove()


def test_queries_with_an_adapter_are_not_merged() -> None:
    layer = make()
    layer.q_b_proj = Adapter(layer.q_b_proj)
    with pytest.raises(
        ValueError, match=r"merge_query: q_b_proj must be a plain nn\.Linear, got A"
    ):
        layer.merge_query()
    assert layer.q_a_proj is not None


def test_incomplete_cache_arguments_are_refused() -> None:
    layer, hidden = make(), torch.randn(1, 3, HIDDEN)
    with pytest.raises(ValueError, match="come together"):
        layer(hidden, cache=torch.zeros(2, 4, R + E))
    with pytest.raises(ValueError, match="prefix_lens needs"):
        layer(hidden, prefix_lens=[3])


def test_sizes_that_do_not_fit_are_refused() -> None:
    rotary = RotaryEmbedding(E, 16)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        MultiheadLatentAttention(HIDDEN, 6, 4, R, NOPE, E, DV, rotary)
    with pytest.raises(ValueError, match="rotary must have dim"):
        MultiheadLatentAttention(HIDDEN, 6, 2, R, NOPE, 64, DV, rotary)


@torch.no_grad()
def test_merged_query_is_the_product_of_both_projections(device):
    layer, hidden = make(device), torch.randn(2, 7, HIDDEN, device=device)
    want = layer(hidden)
    layer.merge_query()
    names = make(device, q_lora_rank=None).state_dict().keys()
    assert layer.state_dict().keys() == names
    torch.testing.assert_close(layer(hidden), want, rtol=1e-4, atol=1e-5)
    layer.merge_query()  # merged already
    with pytest.raises(ValueError, match="a norm follows q_a_proj"):
        make(latent_norm=True).merge_query()


@torch.no_grad()
def test_step_takes_the_norm_before_it(device):
    layer, hidden = make(device), torch.randn(2, 1, HIDDEN, device=device)
    norm = RMSNorm(HIDDEN).to(device)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    caches = [pages(2, device) for _ in range(2)]
    got = run_step(layer, caches[0], hidden, norm=norm, residual=hidden)
    want = hidden + run_step(layer, caches[1], norm(hidden))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    stored = [cache.layers[0].pages for cache in caches]
    torch.testing.assert_close(*stored, rtol=1e-5, atol=1e-6)
