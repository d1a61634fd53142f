import pytest
import torch
from tolerances import factor

from zebra.layers import Mamba2Mixer
from zebra.testing import assert_close

HIDDEN, HEADS, P, N, GROUPS = 48, 4, 32, 16, 2


def make(device: str = "cpu", **options) -> Mamba2Mixer:
    torch.manual_seed(2)
    sizes = {"num_heads": HEADS, "head_dim": P, "state_size": N, "num_kv_heads": GROUPS}
    layer = Mamba2Mixer(HIDDEN, **(sizes | options))
    torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(layer.dt_bias, -2, 1)
    torch.nn.init.uniform_(layer.D, 0.5, 1.5)
    return layer.to(device)


def states(layer: Mamba2Mixer, slots: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    conv = torch.zeros(slots, layer.conv_dim, layer.conv_width - 1, device=device)
    return conv, torch.zeros(slots, HEADS, P, N, device=device)


def close(got: torch.Tensor, hidden: torch.Tensor, eager: torch.Tensor, what: str) -> None:
    truth = make().double()(hidden.double().cpu())[0]
    assert_close(got, truth, eager, factor("mamba2", hidden.dtype), what)


@torch.no_grad()
def test_steps_continue_forward_at_every_split(device: str) -> None:
    layer, hidden = make(device), torch.randn(2, 9, HIDDEN, device=device)
    full, last_conv, last_ssm = layer(hidden)
    for split in range(9):
        conv, ssm = states(layer, 2, device)
        parts = []
        if split:
            part, conv, ssm = layer(hidden[:, :split])
            parts.append(part)
        parts += [layer.step(hidden[:, t : t + 1], conv, ssm) for t in range(split, 9)]
        close(torch.cat(parts, 1), hidden, full, f"split {split}")
        torch.testing.assert_close(conv, last_conv, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ssm, last_ssm, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_forward_continues_from_its_states(device: str) -> None:
    layer, hidden = make(device), torch.randn(2, 70, HIDDEN, device=device)
    full = layer(hidden)[0]
    parts, conv, ssm = [], None, None
    for first, end in ((0, 2), (2, 35), (35, 70)):
        part, conv, ssm = layer(hidden[:, first:end], None, conv, ssm)
        parts.append(part)
    close(torch.cat(parts, 1), hidden, full, "chunks")


@torch.no_grad()
def test_packed_sequences_equal_separate_ones(device: str) -> None:
    layer, lengths = make(device), [5, 1, 9]
    sequences = [torch.randn(1, n, HIDDEN, device=device) for n in lengths]
    cu_seqlens = torch.tensor([0, 5, 6, 15], dtype=torch.int32, device=device)
    packed, conv, ssm = layer(torch.cat(sequences, 1), cu_seqlens)
    for i, (got, alone) in enumerate(zip(packed.split(lengths, dim=1), sequences, strict=True)):
        want, want_conv, want_ssm = layer(alone)
        close(got, alone, want, f"sequence {i}")
        torch.testing.assert_close(conv[i], want_conv[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ssm[i], want_ssm[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_step_touches_only_the_slots_it_is_given(device: str) -> None:
    layer, hidden = make(device), torch.randn(3, 1, HIDDEN, device=device)
    conv, ssm = (torch.randn_like(s) for s in states(layer, 4, device))
    before = conv.clone(), ssm.clone()
    slots = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    out = layer.step(hidden, conv, ssm, slots)
    for kept in (1, 3):
        assert torch.equal(conv[kept], before[0][kept])
        assert torch.equal(ssm[kept], before[1][kept])
    for row, slot in ((0, 2), (2, 0)):
        want, want_conv, want_ssm = layer(
            hidden[row, None], None, before[0][slot, None], before[1][slot, None]
        )
        torch.testing.assert_close(out[row], want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(conv[slot], want_conv[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ssm[slot], want_ssm[0], rtol=1e-4, atol=1e-5)


def test_every_weight_gets_a_gradient(device: str) -> None:
    layer = make(device)
    layer(torch.randn(2, 6, HIDDEN, device=device))[0].square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_autocast_keeps_the_state_in_fp32(device: str) -> None:
    layer = make(device, head_dim=64, state_size=64)  # sizes of the 16-bit CUDA kernel
    hidden = torch.randn(2, 9, HIDDEN, device=device)
    with torch.autocast(device, torch.bfloat16):
        out, conv, ssm = layer(hidden)
    assert (out.dtype, conv.dtype, ssm.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), layer(hidden)[0], rtol=0.1, atol=0.05)
    out.float().sum().backward()
    assert layer.A_log.grad is not None and layer.A_log.grad.dtype == torch.float32


def test_fresh_parameters_follow_the_recipe() -> None:
    layer = Mamba2Mixer(HIDDEN, 4096, 1, 1)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert dt.min() >= 1e-3 * 0.99 and dt.max() <= 0.1 * 1.01
    assert dt.log().mean().item() == pytest.approx(-4.6, abs=0.1)  # log-uniform
    A = layer.A_log.exp()
    assert A.min() >= 1 and A.max() <= 16 and A.mean().item() == pytest.approx(8.5, abs=0.3)
    assert torch.equal(layer.D, torch.ones(4096))


def test_step_refuses_more_than_one_token() -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"\[B, 1, hidden_size\]"):
        layer.step(torch.zeros(2, 2, HIDDEN), *states(layer, 2, "cpu"))


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        make(num_kv_heads=3)
