import logging
import warnings

import pytest
import torch
from transformers.utils import logging as transformers_logging

from zebra.models.cache_name import CACHE_NAME, CACHE_NAMES


def prompts(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (3, 8), generator=torch.Generator().manual_seed(4)).to(device)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 7)):
        mask[row, :padding] = 0
    return ids, mask


def greedy(model, sequence: torch.Tensor, count: int) -> list[int]:
    """The definition of greedy decoding: the full forward pass again for every token."""
    with torch.no_grad():
        for _ in range(count):
            last = model(sequence[None], use_cache=False).logits[0, -1]
            sequence = torch.cat((sequence, last.argmax()[None]))
    return sequence[-count:].tolist()


OPTIONS = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}


@pytest.mark.parametrize("layer_types", [None, ["mamba2"] * 4, ["mla"] * 4], ids=str)
def test_greedy_batch_with_left_padding_equals_recomputation(make_model, device, layer_types):
    model = make_model(**({} if layer_types is None else {"layer_types": layer_types}))
    ids, mask = prompts(device)
    out = model.generate(ids, attention_mask=mask, **OPTIONS)
    for row in range(3):
        assert out[row, 8:].tolist() == greedy(model, ids[row][mask[row].bool()], 10)


def test_generate_without_cache_gives_the_same_tokens(make_model, device) -> None:
    model, (ids, mask) = make_model(), prompts(device)
    cached = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **OPTIONS), cached)


@pytest.mark.parametrize("layer_types", [None, ["mamba2"] * 4], ids=str)
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_continues_from_a_cache(make_model, device, name, layer_types) -> None:
    model = make_model(**({} if layer_types is None else {"layer_types": layer_types}))
    ids, mask = prompts(device)
    want = model.generate(ids, attention_mask=mask, **OPTIONS)
    cache = model.new_cache(3, 32)
    with torch.no_grad():
        model(ids[:, :5], attention_mask=mask[:, :5], **{name: cache})
    got = model.generate(ids, attention_mask=mask, **{name: cache}, **OPTIONS)
    assert torch.equal(got, want)
    assert cache.get_seq_length() == 8 + 10 - 1  # the last token was never fed


@pytest.mark.skipif(CACHE_NAME == "cache", reason="transformers drops the old name and warns")
def test_generate_refuses_a_cache_under_both_names(make_model, device) -> None:
    model, (ids, _) = make_model(), prompts(device)
    caches = {name: model.new_cache(3, 32) for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="generate: pass at most one of cache and past_key_values"):
        model.generate(ids, **caches, **OPTIONS)


def test_generate_warns_of_nothing(make_model, device, caplog) -> None:
    """Its own cache has the name that transformers expects, so no deprecation is met."""
    model, (ids, mask) = make_model(), prompts(device)
    transformers_logging.warning_once.cache_clear()  # or it hides what an earlier test met
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)  # its records do not reach the root
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **OPTIONS)
    finally:
        library.removeHandler(caplog.handler)
    assert not caplog.records
    assert out[CACHE_NAME] is not None


def test_chunked_prefill_gives_the_same_tokens(make_model, device) -> None:
    model, (ids, _) = make_model(), prompts(device)
    want = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, prefill_chunk_size=3, **OPTIONS), want)


def test_beam_search_with_cache_equals_without(make_model, device) -> None:
    model, (ids, mask) = make_model(), prompts(device)
    options = OPTIONS | {"num_beams": 3, "attention_mask": mask}
    assert torch.equal(
        model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    )


def test_sampling_draws_the_requested_sequences(make_model, device) -> None:
    model, (ids, mask) = make_model(), prompts(device)
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=mask, **(OPTIONS | {"do_sample": True, "num_return_sequences": 2})
    )
    assert out.shape == (6, 18)
    assert not torch.equal(out[0], out[1])


def test_generate_under_autocast_stores_its_dtype(make_model, device) -> None:
    model, (ids, mask) = make_model(), prompts(device)
    with torch.autocast(device, torch.bfloat16):
        out = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **OPTIONS
        )
    stored = {layer.pages.dtype for layer in out[CACHE_NAME].layers if hasattr(layer, "pages")}
    assert stored == {torch.bfloat16}
    sequence = out.sequences[1, 3:-1]  # the logits must be those of what was generated
    with torch.no_grad():
        full = model(sequence[None], use_cache=False).logits[0, -10:]
    got = torch.stack([step[1] for step in out.logits]).float()
    assert (got - full).norm() < 0.1 * full.norm()


def test_other_cache_implementations_are_refused(make_model, device) -> None:
    model, (ids, _) = make_model(), prompts(device)
    with pytest.raises(ValueError, match="cache_implementation is not supported"):
        model.generate(ids, cache_implementation="static", **OPTIONS)


def test_assisted_generation_is_refused(make_model, device) -> None:
    model, (ids, _) = make_model(), prompts(device)
    with pytest.raises(NotImplementedError, match="Mamba2 state"):
        model.generate(ids[:1], prompt_lookup_num_tokens=3, **OPTIONS)
