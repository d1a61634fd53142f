"""The next-token loss of padded and packed batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Cross entropy of every token given the tokens before it in its own sequence, fp32, in nats.

    Args:
        logits: [B, T, V].
        labels: [B, T] int64, -100 = ignored.
        attention_mask: [B, T], 0 = padding: neither predicted nor predicting.
        cu_seqlens: Bounds of packed sequences; their first tokens are not predicted.
        num_items: Divide the sum by this instead of by the number of targets.
    """
    target = labels[:, 1:]
    if attention_mask is not None:
        real = attention_mask.bool()
        target = target.masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    if cu_seqlens is not None:
        # a boundary b > 0 names column b as a first token: target b - 1
        first = torch.zeros(labels.size(1) + 1, dtype=torch.bool, device=labels.device)
        first[cu_seqlens.long()] = True
        target = target.masked_fill(first[1:-1], -100)
    loss = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        target.flatten().to(logits.device),
        reduction="mean" if num_items is None else "sum",
    )
    return loss if num_items is None else loss / num_items
