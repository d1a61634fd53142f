import itertools
from copy import deepcopy

import pytest
import torch
from tolerances import factor

from zebra.models import ZebraForCausalLM
from zebra.models.cache_name import CACHE_NAME, CACHE_NAMES
from zebra.testing import assert_close, relative_error

KINDS = {
    "hybrid": ["mla", "mamba2", "attention", "mla"],
    "mla": ["mla"] * 4,
    "mamba2": ["mamba2"] * 4,
}


def tokens(*shape: int, device: str) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(3)).to(device)


def assert_model_close(got, model, ids, full, what: str) -> None:
    """``got`` is as near to the fp64 logits as the full forward pass is."""
    truth = _double(model)(ids.cpu(), use_cache=False).logits
    assert_close(got, truth, full, factor("model", torch.float32), what)


def _double(model) -> ZebraForCausalLM:
    copy = ZebraForCausalLM(model.config).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefill_and_steps_equal_full_forward_at_every_split(make_model, device, kind) -> None:
    model, ids = make_model(layer_types=KINDS[kind]), tokens(2, 10, device=device)
    full = model(ids, use_cache=False).logits
    for split in range(1, 10):
        out = model(ids[:, :split], use_cache=True)
        parts, cache = [out.logits], out.past_key_values
        for t in range(split, 10):
            parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
        assert_model_close(torch.cat(parts, 1), model, ids, full, f"split {split}")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chunked_prefill_equals_one_shot(make_model, device, kind) -> None:
    model, ids = make_model(layer_types=KINDS[kind]), tokens(2, 45, device=device)
    full = model(ids, use_cache=False).logits
    for bounds in ((0, 2, 20, 45), (0, 1, 2, 45), (0, 5, 12, 45)):
        cache = model.new_cache(2, 45)
        parts = [
            model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(bounds)
        ]
        assert_model_close(torch.cat(parts, 1), model, ids, full, f"chunks {bounds}")


def pad(sequences: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(s.numel() for s in sequences)
    ids = torch.full((len(sequences), width), 5, device=sequences[0].device)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(sequences):
        place = slice(width - s.numel(), None) if side == "left" else slice(0, s.numel())
        ids[row, place], mask[row, place] = s, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch_equals_single_sequences(make_model, device, side) -> None:
    model = make_model()
    sequences = [tokens(n, device=device) for n in (7, 12, 1, 4)]
    ids, mask = pad(sequences, side)
    out = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    for row, s in enumerate(sequences):
        alone = model(s[None], use_cache=False).logits
        got = out.logits[row][mask[row].bool()][None]
        assert_model_close(got, model, s[None], alone, f"row {row}")
    assert all(h.shape == (4, 12, 64) for h in out.hidden_states)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_and_no_gradient(make_model, side) -> None:
    model = make_model().train()
    sequences = [tokens(n, device=model.device.type) for n in (7, 12, 4)]
    ids, mask = pad(sequences, side)

    def gradients(run) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = run()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}

    loss, got = gradients(lambda: model(ids, attention_mask=mask, labels=ids).loss)
    ids = torch.where(mask.bool(), ids, 11)  # other padding, same everything
    assert loss == gradients(lambda: model(ids, attention_mask=mask, labels=ids).loss)[0]
    singles = lambda: sum(  # noqa: E731
        model(s[None], labels=s[None], num_items_in_batch=20).loss for s in sequences
    )
    want_loss, want = gradients(singles)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-3, atol=2e-5, msg=name)


@torch.no_grad()
def test_packed_row_equals_single_sequences(make_model, device) -> None:
    model, lengths = make_model(), [5, 1, 9]
    ids = tokens(1, 15, device=device)
    cu_seqlens = torch.tensor([0, 5, 6, 15], dtype=torch.int32, device=device)
    out = model(ids, cu_seqlens=cu_seqlens, labels=ids)
    losses = []
    for got, s in zip(out.logits.split(lengths, 1), ids.split(lengths, 1), strict=True):
        alone = model(s, use_cache=False, labels=s, num_items_in_batch=1)
        assert_model_close(got, model, s, alone.logits, "packed")
        losses.append(alone.loss)
    assert out.loss.item() == pytest.approx(sum(losses).item() / 12, rel=1e-5)


@torch.no_grad()
def test_ragged_prefill_then_ragged_chunk_then_steps(make_model, device) -> None:
    model = make_model()
    rows = [tokens(n, device=device) for n in (9, 12)]
    cache = model.new_cache(2, 16)
    ids, mask = pad([rows[0][:3], rows[1][:6]], "left")
    model(ids, attention_mask=mask, past_key_values=cache)
    ids, mask = pad([rows[0][3:8], rows[1][6:7]], "right")
    model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.lengths == [8, 7]
    ids, mask = pad([rows[0][8:8], rows[1][7:11]], "left")
    model(ids, attention_mask=mask, past_key_values=cache)
    last = torch.stack([rows[0][8:], rows[1][11:]])
    got = model(last, past_key_values=cache).logits
    for row, s in enumerate(rows):
        full = model(s[None], use_cache=False).logits
        truth = _double(model)(s[None].cpu(), use_cache=False).logits[:, -1:]
        bound = factor("model", torch.float32)
        assert_close(got[row, None], truth, full[:, -1:], 2 * bound, f"row {row}")


@torch.no_grad()
def test_prefill_and_device_steps_serve_any_slots(make_model, device) -> None:
    """Admit, step, release and admit again, as an engine does; every row equals its own run."""
    model = make_model()
    rows = [tokens(n + 6, device=device) for n in (9, 3, 5)]
    cache = model.new_cache(4, 32)
    slots = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    got: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    first = model.prefill(torch.cat((rows[0][:9], rows[1][:3])), [9, 3], cache, [2, 0])
    got[0].append(first[0]), got[1].append(first[1])
    for slot, length in ((2, 15), (0, 9)):
        cache.reserve(slot, length)
    for t in range(6):
        ids = torch.stack((rows[0][9 + t], rows[0][0], rows[1][3 + t]))
        logits = model.step(ids, cache, cache.advance(slots))
        got[0].append(logits[0]), got[1].append(logits[2])
    assert cache.seq_lens.tolist() == [9, 0, 15, 0]
    cache.release(2)
    got[2].append(model.prefill(rows[2][:5], [5], cache, [2])[0])
    for row, begin in ((0, 9), (1, 3), (2, 5)):
        ids = rows[row][None]
        full = model(ids, use_cache=False).logits[:, begin - 1 :][:, : len(got[row])]
        truth = _double(model)(ids.cpu(), use_cache=False).logits[:, begin - 1 :]
        assert_close(
            torch.stack(got[row])[None],
            truth[:, : len(got[row])],
            full,
            2 * factor("model", torch.float32),
            f"row {row}",
        )


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_captured_step_follows_the_lengths(make_model, device) -> None:
    """One CUDA graph, replayed while sequences grow across pages."""
    model, ids = make_model(), tokens(2, 30, device="cuda")
    full = model(ids, use_cache=False).logits
    cache = model.new_cache(2, 32)
    slots = torch.arange(2, dtype=torch.int32, device="cuda")
    fed = torch.zeros(2, dtype=torch.long, device="cuda")
    for slot in range(2):
        cache.reserve(slot, 32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model.step(fed, cache, cache.advance(slots))  # warm up, then forget
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        logits = model.step(fed, cache, cache.advance(slots))
    cache.seq_lens.zero_()
    for layer in cache.layers:
        for tensor in vars(layer).values():
            tensor.zero_()
    for t in range(30):
        fed.copy_(ids[:, t])
        graph.replay()
        torch.testing.assert_close(logits, full[:, t], rtol=1e-3, atol=1e-3)


def test_training_forward_compiles_into_one_graph(make_model, device) -> None:
    model, ids = make_model().train(), tokens(2, 6, device=device)
    model(ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_changes_no_gradient(make_model, device) -> None:
    model, ids = make_model().train(), tokens(2, 9, device=device)
    model(ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2  # forward, and again for the backward pass
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-5, atol=1e-7, msg=name)


@torch.no_grad()
def test_hidden_states_enter_each_layer(make_model, device) -> None:
    model, ids = make_model(), tokens(2, 9, device=device)
    out = model(ids, output_hidden_states=True, output_mixer_outputs=True, use_cache=False)
    assert len(out.hidden_states) == 5 and len(out.mixer_outputs) == 4
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    for i, layer in enumerate(model.model.layers):
        hidden, mixed = layer(out.hidden_states[i])
        assert torch.equal(mixed, out.mixer_outputs[i])
        want = out.hidden_states[i + 1]
        torch.testing.assert_close(hidden if i < 3 else model.model.norm(hidden), want)


@torch.no_grad()
def test_logits_to_keep_selects_columns(make_model, device) -> None:
    model, ids = make_model(), tokens(2, 9, device=device)
    full = model(ids, use_cache=False).logits
    # cuBLAS may sum in another order for another number of rows.
    exact = {} if device == "cuda" else {"rtol": 0, "atol": 0}
    last = model(ids, logits_to_keep=2, use_cache=False).logits
    torch.testing.assert_close(last, full[:, -2:], **exact)
    pick = torch.tensor([0, 4], device=device)
    picked = model(ids, logits_to_keep=pick, use_cache=False).logits
    torch.testing.assert_close(picked, full[:, pick], **exact)


@torch.no_grad()
def test_embeddings_and_tuples_are_other_ways_in_and_out(make_model, device) -> None:
    model, ids = make_model(), tokens(2, 9, device=device)
    want = model(ids, use_cache=False).logits
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, use_cache=False).logits, want)
    assert torch.equal(model(ids, use_cache=False, return_dict=False)[0], want)


def test_tied_head_shares_the_embedding(make_model) -> None:
    tied, untied = make_model(tie_word_embeddings=True), make_model()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_cache_is_not_made_where_gradients_flow(make_model, device) -> None:
    model, ids = make_model(), tokens(1, 4, device=device)
    assert model(ids).past_key_values is None
    with torch.no_grad():
        assert model(ids).past_key_values is not None
        assert model(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_the_cache_has_the_names_that_transformers_gives_it(make_model, device) -> None:
    model, ids = make_model(), tokens(1, 4, device=device)
    out, hidden = model(ids), model.model(ids)
    assert out.past_key_values is out[CACHE_NAME] is getattr(out, CACHE_NAME)
    assert hidden.past_key_values is hidden[CACHE_NAME]
    assert list(out.keys()) == ["logits", CACHE_NAME]
    steps = [model(ids[:, :1], **{name: deepcopy(out[CACHE_NAME])}).logits for name in CACHE_NAMES]
    assert torch.equal(*steps)
    assert model.config.keys_to_ignore_at_inference == list(CACHE_NAMES)


def test_contradictory_inputs_are_refused(make_model, device) -> None:
    model, ids = make_model(), tokens(2, 4, device=device)
    cu = torch.tensor([0, 4], dtype=torch.int32, device=device)
    ones = torch.ones_like(ids)
    for text, call in {
        "exactly one of input_ids": lambda: model(),
        "not differentiable": lambda: model(ids, use_cache=True),
        "one packed row": lambda: model(ids, cu_seqlens=cu),
        "not both": lambda: model(ids[:1], cu_seqlens=cu, attention_mask=ones[:1]),
        "must cover the 4 new tokens": lambda: model(ids, attention_mask=ones[:, :3]),
        r"attention_mask must be \[2, tokens\]": lambda: model(ids, attention_mask=ones[0]),
        "output_attentions": lambda: model(ids, output_attentions=True),
        r"cache \(past_key_values\) must be a HybridCache.*got object": lambda: model(
            ids, past_key_values=object()
        ),
        "pass at most one of cache and past_key_values": lambda: model(
            ids, past_key_values=model.new_cache(2, 8), cache=model.new_cache(2, 8)
        ),
        "leave logits_to_keep at 0": lambda: model(ids, labels=ids, logits_to_keep=1),
        r"\[sum\(new_lens\)\] = \[4\]": lambda: model.prefill(
            ids[0], [3, 1, 0], model.new_cache(3, 8)
        ),
        "max_position_embeddings = 256": lambda: model(ids.repeat(1, 65)),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
    with torch.no_grad(), pytest.raises(ValueError, match="holds 1 sequences"):
        model(ids, past_key_values=model.new_cache(1, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_decodes_as_well_as_it_runs_forward(make_model, device, dtype) -> None:
    model, ids = make_model().to(dtype), tokens(2, 12, device=device)
    full = model(ids, use_cache=False).logits
    out = model(ids[:, :6], use_cache=True)
    steps = [model(ids[:, t : t + 1], past_key_values=out.past_key_values) for t in range(6, 12)]
    got = torch.cat([out.logits, *(s.logits for s in steps)], 1)
    assert got.dtype == full.dtype == dtype
    truth = _double(model)(ids.cpu(), use_cache=False).logits
    assert_close(got, truth, full, factor("model", dtype), "steps")
    assert relative_error(full, truth) < {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


def test_training_under_autocast_gives_fp32_gradients(make_model, device) -> None:
    model, ids = make_model().train(), tokens(2, 12, device=device)
    want = model(ids, labels=ids).loss.item()
    with torch.autocast(device, torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
