"""A byte-level tokenizer as an ordinary Hugging Face tokenizer: token i is byte i."""

from __future__ import annotations

from typing import Any

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIALS = (BOS, EOS, PAD)  # ids 256, 257, 258: first after the 256 bytes
VOCAB_SIZE = 256 + len(SPECIALS)


def _printable_bytes() -> list[str]:
    """Return the printable character that byte-level tokenizers write for each byte 0..255.

    Printable Latin-1 bytes stand for themselves, the other 68 take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    names = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [names[b] for b in range(256)]


def _byte_vocabulary() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(_printable_bytes())}


def is_byte_tokenizer(tokenizer: Any) -> bool:
    """Say whether a tokenizer is :func:`byte_tokenizer`'s: its tokens are the bytes of the text.

    With no entry beyond the bytes and the specials nothing can be merged.
    """
    specials = {token: 256 + i for i, token in enumerate(SPECIALS)}
    return bool(tokenizer.get_vocab() == _byte_vocabulary() | specials)


def byte_tokenizer() -> Any:
    """Build a tokenizer whose token i is byte i of the UTF-8 text; bos, eos and pad follow.

    Any text round-trips exactly, text that spells a special token included: only
    ``add_special_tokens`` ever produces one.  ``save_pretrained`` writes a folder that
    ``AutoTokenizer.from_pretrained`` loads.

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` with 259 tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIALS])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
