"""How composites are registered."""

import pytest
import torch

from zebra.ops._register import differentiable


@pytest.fixture
def library():
    with torch.library._scoped_library("zebra_test", "FRAGMENT") as lib:
        yield lib


def test_a_composite_can_differentiate_below_autograd(library):
    def twice(x):
        with differentiable():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(leaf.square().sum(), leaf)[0]

    library.define("slope(Tensor x) -> Tensor")
    library.impl("slope", twice, "CPU")
    torch.library.register_fake("zebra_test::slope", torch.empty_like, lib=library)
    x = torch.randn(3)
    torch.testing.assert_close(torch.ops.zebra_test.slope(x), 2 * x)
    # opcheck calls the implementation with autograd excluded, as tracing does.
    torch.library.opcheck(torch.ops.zebra_test.slope.default, (x,))
