import pytest
import torch

from zebra.cache import HybridCache, PagedSpec, StateSpec, token_slots

SPECS = [PagedSpec(6), StateSpec(5, 4, 2, 3, 3)]


def make(**options) -> HybridCache:
    options = {"max_batch": 3, "max_length": 10, "page_size": 4, "dtype": torch.float32} | options
    return HybridCache(SPECS, **options)


def test_slots_address_each_token_once(device: str) -> None:
    cache = make(device=device)
    first = cache.extend([5, 2, 0], packed=True)
    second = cache.extend([3, 3, 3])
    assert first.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert second.positions.tolist() == [[5, 6, 7], [2, 3, 4], [0, 1, 2]]
    assert second.prefix_lens == [5, 2, 0]
    assert second.seq_lens.tolist() == cache.lengths == [8, 5, 3]
    slots = first.slot_mapping.flatten().tolist() + second.slot_mapping.flatten().tolist()
    assert len(set(slots)) == 16
    for row, position in ((0, 6), (1, 4), (2, 1)):
        page = cache.block_table[row, position // 4].item()
        column = second.positions[row].tolist().index(position)
        assert second.slot_mapping[row, column].item() == page * 4 + position % 4


def test_rows_may_take_any_slots() -> None:
    cache = make()
    rows = cache.extend([2, 2], slots=[2, 0])
    assert rows.slots.tolist() == [2, 0]
    assert torch.equal(rows.block_table, cache.block_table[[2, 0]])
    assert cache.lengths == [2, 0, 2]


def test_token_slots_pads_rows_that_are_too_short(device: str) -> None:
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32, device=device)
    lens = torch.tensor([5, 1], dtype=torch.int32, device=device)
    slots, positions = token_slots(table, lens, 3, 4)
    assert slots.tolist() == [[14, 15, 4], [-1, -1, 8]]
    assert positions.tolist() == [[2, 3, 4], [0, 0, 0]]


def test_released_pages_are_used_again() -> None:
    cache = make(num_pages=4)
    cache.extend([8, 8], slots=[0, 1])
    with pytest.raises(ValueError, match="1 pages of 4 tokens are needed for slot 2, 0 of 4 are"):
        cache.extend([1], slots=[2])
    cache.layers[1].ssm_state[0] = 7
    cache.release(0)
    assert cache.lengths == [0, 8, 0]
    assert not cache.layers[1].ssm_state[0].any()
    rows = cache.extend([8], slots=[2])
    assert not set(cache.tables[2]) & set(cache.tables[1])
    assert rows.prefix_lens == [0]


def test_reset_frees_every_page() -> None:
    cache = make()
    cache.extend([4, 4, 4])
    cache.reset()
    assert len(cache.free) == cache.num_pages and cache.lengths == [0, 0, 0]
    assert cache.seq_lens.tolist() == [0, 0, 0]


def test_growing_keeps_what_is_stored() -> None:
    cache = make(max_batch=1, growable=True)
    rows = cache.extend([9])
    pages = cache.layers[0].pages
    pages.view(-1, 6)[rows.slot_mapping[0]] = torch.arange(9.0)[:, None].expand(9, 6)
    rows = cache.extend([40])
    assert cache.max_length >= 49
    place = token_slots(cache.block_table, cache.seq_lens, 49, 4)[0][0]
    stored = cache.layers[0].pages.view(-1, 6)[place]
    assert torch.equal(stored[:9, 0], torch.arange(9.0))
    assert place.max() < cache.num_pages * 4 and len(set(place.tolist())) == 49


def test_fixed_cache_keeps_its_addresses() -> None:
    cache = make()
    before = [t.data_ptr() for t in (cache.layers[0].pages, cache.block_table, cache.seq_lens)]
    cache.extend([10, 10, 10])
    after = [t.data_ptr() for t in (cache.layers[0].pages, cache.block_table, cache.seq_lens)]
    assert before == after


def test_reordering_copies_pages_and_states() -> None:
    cache = make()
    rows = cache.extend([5, 5, 5])
    cache.layers[0].pages.view(-1, 6)[rows.slot_mapping] = torch.randn(3, 5, 6)
    cache.layers[1].conv_state.normal_()
    cache.layers[1].ssm_state.normal_()
    read = lambda row: cache.layers[0].pages.view(-1, 6)[rows.slot_mapping[row]].clone()  # noqa: E731
    want = [read(row) for row in (1, 1, 0)]
    states = cache.layers[1].ssm_state[[1, 1, 0]].clone()
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert all(torch.equal(read(i), w) for i, w in enumerate(want))
    assert torch.equal(cache.layers[1].ssm_state, states)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: c.extend([13]), "at most max_length = 12"),
        (lambda c: c.extend([1, 2]), "must be packed"),
        (lambda c: c.extend([1], slots=[3]), r"one slot in \[0, 3\)"),
        (lambda c: c.extend([1] * 4), r"one slot in \[0, 3\)"),
        (lambda c: make(page_size=0), "page_size must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(make())


def test_dropping_tokens_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="Mamba2 state"):
        make().crop(-1)
