import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from zebra.data import Document, byte_tokenizer
from zebra.evaluate import bits_per_byte


class Bigram(torch.nn.Module):
    """Predicts by the last token alone, so that a score can be added up by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(259, 259))
        self.device, self.seen = torch.device("cpu"), []

    def forward(self, ids, use_cache=None):
        self.seen.append(tuple(ids.shape))
        return SimpleNamespace(logits=self.table[ids])


TEXTS = [Document("a", "caf\u00e9 au lait"), Document("b", "x" * 21), Document("c", "yz")]


def by_hand(model, texts):
    bits, log_p = 0.0, torch.log_softmax(model.table.detach().double(), -1)
    for text in texts:
        ids = [256, *text.encode()]
        bits -= sum(log_p[a, b].item() for a, b in pairwise(ids)) / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("context", [3, 7, 100])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_byte_is_scored_once_whatever_the_windows(context, batch):
    model = Bigram()
    score = bits_per_byte(model, byte_tokenizer(), TEXTS, context, batch)
    assert score.bits_per_byte == pytest.approx(by_hand(model, [d.text for d in TEXTS]), rel=1e-5)
    assert (score.bytes, score.tokens, score.documents) == (36, 36, 3)
    assert max(length for _, length in model.seen) <= context
    assert max(rows for rows, _ in model.seen) <= batch


def test_tokens_and_bytes_are_counted_apart():
    class Pairs:  # a tokenizer of two characters a token
        bos_token_id, eos_token_id = None, 7

        def __call__(self, text, **_):
            return {"input_ids": [ord(text[i]) for i in range(0, len(text), 2)]}

    model = Bigram()
    score = bits_per_byte(model, Pairs(), [Document("a", "abcd")])
    assert (score.tokens, score.bytes) == (2, 4)
    log_p = torch.log_softmax(model.table.detach().double(), -1)
    nats = -(log_p[7, ord("a")] + log_p[ord("a"), ord("c")]).item()
    assert score.nats_per_token == pytest.approx(nats / 2)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 4)


def test_max_bytes_cuts_at_a_whole_character():
    score = bits_per_byte(Bigram(), byte_tokenizer(), TEXTS, max_bytes=4)
    assert (score.bytes, score.documents) == (3 + 4 + 2, 3)  # e-acute has two bytes: one too many


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="must hold text, got none"):
        bits_per_byte(Bigram(), byte_tokenizer(), [])
