"""Linear layers of a decoding step: one operator where nobody altered them, else the layer."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from zebra.layers import MLP, RMSNorm, linear
from zebra.layers.linear import decode_linear
from zebra.testing import relative_error

K, N = 64, 48


class Doubled(nn.Linear):
    """Stands for an adapter: a linear layer that is not what its weight says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def make(device: str, dtype: torch.dtype, rows: int = 3, kind: type[nn.Linear] = nn.Linear):
    layer = kind(K, N, bias=kind is Doubled).to(device, dtype)
    norm = RMSNorm(K).to(device, dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, residual = (torch.randn(rows, 1, n, device=device, dtype=dtype) for n in (K, N))
    return layer, norm, x, residual


def exact(module: nn.Module) -> nn.Module:
    """The module in fp64, on the CPU."""
    return copy.deepcopy(module).cpu().double()


def wide(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 200])
@torch.no_grad()
def test_decode_linear_is_norm_layer_and_residual(dtype, rows, device):
    layer, norm, x, residual = make(device, dtype, rows)
    got = decode_linear(layer, x, norm, residual)
    want = wide(residual) + exact(layer)(exact(norm)(wide(x)))
    assert got.dtype == dtype and got.shape == residual.shape
    assert relative_error(got, want) < 2 * torch.finfo(dtype).eps
    plain = decode_linear(layer, x)
    assert relative_error(plain, exact(layer)(wide(x))) < 2 * torch.finfo(dtype).eps


@torch.no_grad()
def test_decode_linear_calls_a_layer_that_is_not_plain(device):
    layer, norm, x, residual = make(device, torch.bfloat16, kind=Doubled)
    torch.testing.assert_close(decode_linear(layer, x), layer(x))
    layer, norm, x, residual = make(device, torch.bfloat16)
    hooked = mock.Mock(return_value=None)
    layer.register_forward_hook(hooked)
    decode_linear(layer, x, norm, residual)
    hooked.assert_called_once()
    patched = mock.Mock(side_effect=norm.forward)
    norm.forward = patched
    decode_linear(nn.Linear(K, N, device=device, dtype=torch.bfloat16), x, norm)
    patched.assert_called_once()


def test_decode_linear_keeps_gradients_where_they_are_asked_for(device):
    layer, norm, x, _ = make(device, torch.bfloat16)
    decode_linear(layer, x.requires_grad_(), norm).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@torch.no_grad()
def test_mlp_step_adds_the_block_of_the_norm(activation, device):
    mlp = MLP(K, 96, activation).to(device, torch.bfloat16)
    norm = RMSNorm(K).to(device, torch.bfloat16)
    x = torch.randn(4, 1, K, device=device, dtype=torch.bfloat16)
    got = mlp.step(x, norm)
    with mock.patch.object(linear, "MAX_DECODE_ROWS", 0):
        plain = mlp.step(x, norm)
    want = wide(x) + exact(mlp)(exact(norm)(wide(x)))
    assert relative_error(got, want) < 1.2 * relative_error(plain, want) + 1e-6
    called = mock.Mock(return_value=None)
    mlp.register_forward_hook(called)
    mlp.step(x, norm)
    called.assert_called_once()
