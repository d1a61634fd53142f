"""Packed token blocks in a seeded order; the number of blocks taken is the whole state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zebra.data.corpus import Document
from zebra.data.tokenizer import is_byte_tokenizer

DOCUMENTS_PER_CALL = 64  # documents given to the tokenizer at once: keeps its threads busy


def pack(documents: Iterable[Document], tokenizer: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Concatenate documents into one token array, each between the tokenizer's bos and eos.

    Args:
        documents: The texts, in order.
        tokenizer: A Hugging Face tokenizer; a bos or eos it does not have is left out.

    Returns:
        int32 token ids, [n].
    """
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    batch: list[str] = []

    bytewise = is_byte_tokenizer(tokenizer)  # then there is nothing to look up, 50 times faster

    def flush() -> None:
        if batch:
            encoded = (
                [np.frombuffer(text.encode(), dtype=np.uint8) for text in batch]
                if bytewise
                else tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            )
            parts.extend(np.concatenate([before, ids, after]).astype(np.int32) for ids in encoded)
            batch.clear()

    for document in documents:
        batch.append(document.text)
        if len(batch) == DOCUMENTS_PER_CALL:
            flush()
    flush()
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


class PackedTokens:
    """Fixed-length blocks of one token array, reshuffled every epoch by a seed.

    Block k of the stream depends only on (tokens, length, seed, k), so ``position``, the number of
    blocks already taken, is all that a checkpoint has to keep.
    """

    def __init__(self, tokens: np.ndarray[Any, np.dtype[np.int32]], length: int, seed: int) -> None:
        """Cut ``tokens`` [n] into blocks of ``length``; a rest shorter than that is dropped.

        Raises:
            ValueError: There is not one whole block.
        """
        self.blocks = len(tokens) // length if length > 0 else 0
        if self.blocks == 0:
            raise ValueError(
                f"zebra.data: a block takes {length} tokens, got a corpus of {len(tokens)}"
            )
        self.tokens, self.length, self.seed = tokens, length, seed
        self.position = 0
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def take(self, count: int) -> Tensor:
        """Return the next ``count`` blocks, [count, length] int64, and move the position."""
        rows = [self._block(self.position + k) for k in range(count)]
        self.position += count
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _block(self, index: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        epoch, place = divmod(index, self.blocks)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.blocks)
        first = int(self._order[place]) * self.length
        return self.tokens[first : first + self.length]
