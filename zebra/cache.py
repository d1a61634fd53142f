"""The state of sequences being decoded: paged latents and keys, convolution and SSM states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedSpec:
    """A layer that stores ``width`` numbers for every token."""

    width: int


@dataclass(frozen=True)
class StateSpec:
    """A layer that stores a convolution window and an SSM state for every sequence."""

    conv_dim: int
    conv_width: int
    num_heads: int
    head_dim: int
    state_size: int


LayerSpec = PagedSpec | StateSpec


@dataclass
class PagedLayer:
    """pages [num_pages + 1, page_size, width]; the last page takes tokens that are not stored."""

    pages: Tensor


@dataclass
class StateLayer:
    """conv_state [slots, conv_dim, conv_width - 1] and ssm_state [slots, H, P, N]."""

    conv_state: Tensor
    ssm_state: Tensor


@dataclass
class CacheRows:
    """Where the new tokens of one forward pass go; from :meth:`HybridCache.extend` or
    :meth:`HybridCache.advance`.

    Attributes:
        slots: [B] int32, the sequence slot of every row; -1 = padding row.
        block_table: [B, max_pages] int32.
        seq_lens: [B] int32 tokens of every row, new ones included.
        slot_mapping: int64 page * page_size + offset of every new token: [B, T], or [1, total]
            where the rows are packed; -1 = not stored.
        positions: int64, as slot_mapping: the place of every new token in its sequence.
        prefix_lens: Tokens of every row before the new ones, on the host (empty after advance).
        new_lens: New tokens of every row, on the host (empty after advance).
    """

    slots: Tensor
    block_table: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    positions: Tensor
    prefix_lens: list[int]
    new_lens: list[int]


def token_slots(
    block_table: Tensor, seq_lens: Tensor, new_tokens: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """Find the last ``new_tokens`` tokens of every sequence in the pages, without a host copy.

    Args:
        block_table: [B, max_pages] int32.
        seq_lens: [B] int32 lengths, new tokens included; a row shorter than new_tokens is padded
            in front.
        new_tokens: T.
        page_size: Tokens in a page.

    Returns:
        slot_mapping [B, T] int64 (-1 before the start of a sequence) and positions [B, T] int64.
    """
    offset = torch.arange(new_tokens, device=seq_lens.device) - new_tokens
    position = seq_lens.long()[:, None] + offset
    place = position.clamp(min=0)
    page = block_table.long().gather(1, place // page_size)
    slot = torch.where(position < 0, -1, page * page_size + place % page_size)
    return slot, place


class HybridCache:
    """Decoding state of up to ``max_batch`` sequences over layers of any kind.

    Every paged layer shares one block table: sequence slot b stores token t at offset
    t % page_size of page block_table[b, t // page_size].  Pages are handed out as sequences grow
    and come back with :meth:`release`.  Tensors keep their addresses unless ``growable``.

    It fits ``generate()`` of transformers: padding never enters it, so a batch with padding on
    either side needs no mask once a token is stored.

    Args:
        layers: One spec for every layer.
        max_batch: Sequence slots.
        max_length: Longest sequence, in tokens.
        num_pages: Pages shared by all sequences; None means enough for max_batch full sequences.
        page_size: Tokens in a page.
        dtype: Of latents, keys, values and convolution windows.
        state_dtype: Of the SSM states.
        device: Where the tensors live.
        growable: Enlarge the pages and the block table on demand instead of raising.

    Raises:
        ValueError: If a size is not positive.
    """

    is_compileable = False  # generate(): the loop itself is not compiled
    is_croppable = False  # an SSM state cannot forget its last tokens
    is_linear = (False,)  # generate(): get_seq_length() is known even where all layers are SSMs

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        max_batch: int,
        max_length: int,
        num_pages: int | None = None,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        growable: bool = False,
    ) -> None:
        for name, value in (
            ("max_batch", max_batch),
            ("max_length", max_length),
            ("page_size", page_size),
        ):
            if value < 1:
                raise ValueError(f"HybridCache: {name} must be positive, got {value}")
        self.specs, self.max_batch, self.page_size = list(layers), max_batch, page_size
        self.growable, self.device = growable, torch.device(device)
        max_pages = -(-max_length // page_size)
        self.num_pages = max_batch * max_pages if num_pages is None else num_pages
        self.layers: list[PagedLayer | StateLayer] = []
        for spec in self.specs:
            if isinstance(spec, PagedSpec):
                shape = (self.num_pages + 1, page_size, spec.width)
                self.layers.append(PagedLayer(torch.zeros(shape, dtype=dtype, device=device)))
            else:
                window = (max_batch, spec.conv_dim, spec.conv_width - 1)
                state = (max_batch, spec.num_heads, spec.head_dim, spec.state_size)
                self.layers.append(
                    StateLayer(
                        torch.zeros(window, dtype=dtype, device=device),
                        torch.zeros(state, dtype=state_dtype, device=device),
                    )
                )
        self.block_table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.lengths = [0] * max_batch  # seq_lens, on the host
        self.tables: list[list[int]] = [[] for _ in range(max_batch)]
        self.free = list(range(self.num_pages - 1, -1, -1))
        self.columns = 0  # tokens a row has been given, padding included: what generate() counts

    @property
    def max_length(self) -> int:
        """Longest sequence that the block table can address, in tokens."""
        return self.block_table.size(1) * self.page_size

    def reserve(self, slot: int, length: int) -> None:
        """Give the sequence in ``slot`` the pages for ``length`` tokens.

        Raises:
            ValueError: If the sequence is longer than max_length or the pages have run out.
        """
        pages = -(-length // self.page_size)
        missing = pages - len(self.tables[slot])
        if missing <= 0:
            return
        if pages > self.block_table.size(1):
            if not self.growable:
                raise ValueError(
                    f"HybridCache: a sequence must have at most max_length = {self.max_length} "
                    f"tokens, got {length}"
                )
            self._widen_table(max(pages, 2 * self.block_table.size(1)))
        if missing > len(self.free):
            if not self.growable:
                raise ValueError(
                    f"HybridCache: {missing} pages of {self.page_size} tokens are needed for "
                    f"slot {slot}, {len(self.free)} of {self.num_pages} are free"
                )
            self._add_pages(max(missing, self.num_pages))
        first = len(self.tables[slot])
        new = [self.free.pop() for _ in range(missing)]
        self.tables[slot] += new
        self.block_table[slot, first:pages] = torch.tensor(
            new, dtype=torch.int32, device=self.device
        )

    def release(self, slot: int) -> None:
        """Forget the sequence in ``slot``: give back its pages and zero its states."""
        self.free += reversed(self.tables[slot])
        self.tables[slot] = []
        self.lengths[slot] = 0
        self.seq_lens[slot] = 0
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.conv_state[slot] = 0
                layer.ssm_state[slot] = 0

    def reset(self) -> None:
        """Forget every sequence."""
        for slot in range(self.max_batch):
            self.release(slot)
        self.columns = 0

    def extend(
        self, new_lens: Sequence[int], slots: Sequence[int] | None = None, packed: bool = False
    ) -> CacheRows:
        """Make room for new tokens and say where each goes.

        Args:
            new_lens: New tokens of every row.
            slots: Sequence slot of every row; None means row i is slot i.
            packed: Lay the tokens of all rows out as one row; else every row has the same number.

        Returns:
            The rows, for the layers.

        Raises:
            ValueError: If the rows do not fit the cache.
        """
        slots = list(range(len(new_lens))) if slots is None else list(slots)
        if len(slots) != len(new_lens) or any(not 0 <= s < self.max_batch for s in slots):
            raise ValueError(
                f"HybridCache: one slot in [0, {self.max_batch}) is needed for each of "
                f"{len(new_lens)} rows, got {slots}"
            )
        if not packed and len(set(new_lens)) > 1:
            raise ValueError(f"HybridCache: rows of unequal lengths {new_lens} must be packed")
        prefix = [self.lengths[s] for s in slots]
        for slot, old, new in zip(slots, prefix, new_lens, strict=True):
            self.reserve(slot, old + new)
        for slot, old, new in zip(slots, prefix, new_lens, strict=True):
            self.lengths[slot] = old + new
        index = torch.tensor(slots, dtype=torch.long, device=self.device)
        old_lens = self.seq_lens[index]
        lens = old_lens + torch.tensor(new_lens, dtype=torch.int32, device=self.device)
        self.seq_lens[index] = lens
        table = self.block_table[index]
        slot_mapping, positions = token_slots(table, lens, max(new_lens, default=0), self.page_size)
        if packed:
            longest = max(new_lens, default=0)
            column = torch.arange(longest, device=self.device)
            keep = column >= longest - (lens - old_lens)[:, None]
            slot_mapping, positions = slot_mapping[keep][None], positions[keep][None]
        return CacheRows(index.int(), table, lens, slot_mapping, positions, prefix, list(new_lens))

    def advance(self, slots: Tensor) -> CacheRows:
        """Count one more token for every row, on the device alone: safe under graph capture.

        The caller has reserved the pages (:meth:`reserve`) and keeps the host's ``lengths``.

        Args:
            slots: [B] int32 on the device, no slot twice; -1 = padding row.
        """
        live, index = slots >= 0, slots.clamp(min=0).long()
        self.seq_lens.index_add_(0, index, live.int())
        lens = torch.where(live, self.seq_lens[index], 0)
        table = self.block_table[index]
        slot_mapping, positions = token_slots(table, lens, 1, self.page_size)
        return CacheRows(slots, table, lens, slot_mapping, positions, [], [])

    def _widen_table(self, pages: int) -> None:
        wider = self.block_table.new_zeros(self.max_batch, pages)
        wider[:, : self.block_table.size(1)] = self.block_table
        self.block_table = wider

    def _add_pages(self, count: int) -> None:
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                room = layer.pages.new_zeros(count, *layer.pages.shape[1:])
                layer.pages = torch.cat((layer.pages[:-1], room, layer.pages[-1:]))
        self.free = list(range(self.num_pages + count - 1, self.num_pages - 1, -1)) + self.free
        self.num_pages += count

    # ---- what generate() of transformers asks of a cache ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens given to every row so far, padding included."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Longest sequence in tokens, or -1 where the cache grows."""
        return -1 if self.growable else self.max_length

    get_max_length = get_max_cache_shape

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b continue row beam_idx[b] (beam search)."""
        source = beam_idx.tolist()
        for slot, origin in enumerate(source):
            self.reserve(slot, self.lengths[origin])
        used = [-(-self.lengths[origin] // self.page_size) for origin in source]
        read = [p for origin, n in zip(source, used, strict=True) for p in self.tables[origin][:n]]
        write = [p for slot, n in enumerate(used) for p in self.tables[slot][:n]]
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.pages[write] = layer.pages[read]
            else:
                rows = slice(0, len(source))
                layer.conv_state[rows] = layer.conv_state[beam_idx]
                layer.ssm_state[rows] = layer.ssm_state[beam_idx]
        self.lengths[: len(source)] = [self.lengths[origin] for origin in source]
        self.seq_lens[: len(source)] = self.seq_lens[beam_idx]

    def crop(self, *args: int) -> None:
        """Refuse: an SSM state holds no past to go back to.

        Raises:
            NotImplementedError: Always; assisted and contrastive decoding need a croppable cache.
        """
        raise NotImplementedError(
            "HybridCache cannot drop tokens: a Mamba2 state holds no past to go back to. "
            "Assisted (speculative) and contrastive decoding are not supported"
        )

    def activate_past_recording(self) -> None:
        """Refuse, as :meth:`crop`: called by assisted decoding before it starts."""
        self.crop()
