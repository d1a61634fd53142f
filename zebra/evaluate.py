"""How well a causal LM predicts text: bits per byte, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from zebra.data import Document


class TextScore(NamedTuple):
    """What was predicted, in tokens and UTF-8 bytes, and at what cost."""

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    bytes: int
    documents: int


def bits_per_byte(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document],
    context: int = 1024,
    batch: int = 8,
    max_bytes: int | None = None,
    progress: bool = False,
) -> TextScore:
    """Return the model's mean code length of the documents' text.

    Equation::

        bpb = sum over text tokens of -log2 p(token | what precedes it in its window) / UTF-8 bytes

    Every token of a document is predicted exactly once.  A document is cut into windows of
    ``context`` predictions; its first token is predicted from bos (eos where there is no bos), and
    each later window starts with the token before it.

    Args:
        model: A causal LM, on its device.
        tokenizer: Its tokenizer.
        documents: The texts.
        context: Predictions in one window, in tokens.
        batch: Windows in one forward pass.
        max_bytes: Score no more than the first so many bytes of each document.
        progress: Show a progress bar.

    Returns:
        Bits per byte, nats per token, and the tokens, bytes and documents counted.

    Raises:
        ValueError: No text, or a tokenizer with neither bos nor eos.

    Numerics:
        Log-probabilities in fp32, sums in fp64.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("zebra.evaluate: the tokenizer must have a bos or eos token, got neither")
    windows: list[list[int]] = []  # the first token of each is context, the others are predicted
    counted, used = 0, 0
    for document in documents:
        text = document.text if max_bytes is None else _cut(document.text, max_bytes)
        if not text:
            continue
        counted += len(text.encode("utf-8", "surrogatepass"))
        used += 1
        ids = [start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        windows += [ids[i : i + context + 1] for i in range(0, len(ids) - 1, context)]
    if not windows:
        raise ValueError("zebra.evaluate: the documents must hold text, got none")
    tokens = sum(len(window) - 1 for window in windows)
    nats = _total_nats(model, windows, batch, progress)
    return TextScore(nats / math.log(2) / counted, nats / tokens, tokens, counted, used)


def _cut(text: str, limit: int) -> str:
    """Return the longest start of ``text`` that is whole characters and at most ``limit`` bytes."""
    return text.encode("utf-8", "surrogatepass")[: max(0, limit)].decode("utf-8", "ignore")


@torch.no_grad()
def _total_nats(model: Any, windows: list[list[int]], batch: int, progress: bool) -> float:
    from tqdm.auto import tqdm

    # Equal lengths share a pass, so no padding is ever scored or seen.
    ordered = sorted(windows, key=lambda window: -len(window))
    groups: list[list[list[int]]] = []
    for window in ordered:
        if groups and len(groups[-1]) < batch and len(groups[-1][0]) == len(window):
            groups[-1].append(window)
        else:
            groups.append([window])
    was_training, total = model.training, 0.0
    model.eval()
    bar = tqdm(total=len(windows), desc="eval", unit="window", disable=not progress, leave=False)
    for group in groups:
        ids = torch.tensor(group, device=model.device)
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += nats.double().sum().item()
        bar.update(len(group))
    bar.close()
    model.train(was_training)
    return total
