"""Text in, packed token blocks out: tokenizer, corpora, and streams that resume."""

from zebra.data.corpus import Document, read_documents
from zebra.data.stream import PackedTokens, pack
from zebra.data.tokenizer import byte_tokenizer

__all__ = ["Document", "PackedTokens", "byte_tokenizer", "pack", "read_documents"]
