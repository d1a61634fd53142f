import pytest
import torch
from tolerances import factor

from zebra.cache import HybridCache, PagedSpec
from zebra.layers import Attention, RotaryEmbedding
from zebra.testing import assert_close

HIDDEN, HEADS, GROUPS, D = 48, 4, 2, 32


def make(device: str = "cpu", **options) -> Attention:
    torch.manual_seed(2)
    layer = Attention(HIDDEN, HEADS, GROUPS, D, RotaryEmbedding(D, 64), **options)
    for name, p in layer.named_parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if "norm" in name else p.data.mul_(2)
    return layer.to(device)


def run(layer, cache, hidden, step: bool):
    rows = cache.extend([hidden.size(1)] * hidden.size(0))
    store = cache.layers[0].pages
    if step:
        return layer.step(
            hidden, rows.positions, store, rows.slot_mapping, rows.block_table, rows.seq_lens
        )
    return layer(
        hidden,
        rows.positions,
        cache=store,
        slot_mapping=rows.slot_mapping,
        block_table=rows.block_table,
        prefix_lens=rows.prefix_lens,
        new_lens=rows.new_lens,
    )


@pytest.mark.parametrize("options", [{}, {"bias": True, "out_bias": True}, {"qk_norm": True}])
@torch.no_grad()
def test_steps_and_chunks_equal_full_forward(device: str, options: dict) -> None:
    layer, hidden = make(device, **options), torch.randn(2, 11, HIDDEN, device=device)
    full = layer(hidden)
    truth = make(**options).double()(hidden.double().cpu())
    cache = HybridCache(
        [PagedSpec(layer.cache_width)], 2, 20, page_size=4, dtype=torch.float32, device=device
    )
    cache.layers[0].pages.fill_(float("nan"))
    parts = [run(layer, cache, hidden[:, :3], step=False)]
    parts += [run(layer, cache, hidden[:, 3:8], step=False)]
    parts += [run(layer, cache, hidden[:, t : t + 1], step=True) for t in range(8, 11)]
    assert_close(torch.cat(parts, 1), truth, full, factor("attention", torch.float32), str(options))


@torch.no_grad()
def test_packed_sequences_equal_separate_ones(device: str) -> None:
    layer, lengths = make(device), [5, 1, 9]
    sequences = [torch.randn(1, n, HIDDEN, device=device) for n in lengths]
    cu_seqlens = torch.tensor([0, 5, 6, 15], dtype=torch.int32, device=device)
    packed = layer(torch.cat(sequences, 1), cu_seqlens=cu_seqlens)
    for got, alone in zip(packed.split(lengths, dim=1), sequences, strict=True):
        torch.testing.assert_close(got, layer(alone), rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        Attention(HIDDEN, 4, 3, D, RotaryEmbedding(D, 8))
    with pytest.raises(ValueError, match="rotary must have dim"):
        Attention(HIDDEN, 4, 2, D, RotaryEmbedding(16, 8))
    with pytest.raises(ValueError, match="prefix_lens needs"):
        make()(torch.zeros(1, 2, HIDDEN), prefix_lens=[2])
