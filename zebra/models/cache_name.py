"""What the installed transformers calls the decoding cache; only this file knows.

Its outputs and generate() say ``past_key_values`` up to 5.23 and ``cache`` from 5.24 on, where
the old name still works and warns.  Our forward and generate() take both under every version.
"""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

from zebra.cache import HybridCache

CACHE_NAMES = ("cache", "past_key_values")
_OUTPUT_FIELDS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE_NAME = next(name for name in CACHE_NAMES if name in _OUTPUT_FIELDS)


def one_cache(
    where: str, cache: HybridCache | None, past_key_values: HybridCache | None
) -> HybridCache | None:
    """Return the cache that was passed under either name, or None.

    Args:
        where: The function to name in the error.
        cache: The argument of this name.
        past_key_values: The argument of this name.

    Raises:
        ValueError: If both are given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            f"{where}: pass at most one of cache and past_key_values (two names of one argument), "
            f"got both"
        )
    return past_key_values if cache is None else cache
