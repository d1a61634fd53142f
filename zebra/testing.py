"""Comparison with the truth, shared by the tests and by the correctness gate of the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth|| in fp64; NaN or infinity in ``got`` gives infinity.

    An all-zero truth is compared absolutely.
    """
    truth = truth.detach().double()  # on its own device: moving a large one takes seconds
    got = got.detach().double().to(truth.device)
    if got.shape != truth.shape:
        raise ValueError(f"shapes differ: got {list(got.shape)}, truth {list(truth.shape)}")
    same = (got == truth) | (got.isnan() & truth.isnan())  # equal infinities subtract to NaN
    difference = torch.where(same, 0.0, got - truth)
    if not bool(difference.isfinite().all()):
        return float("inf")
    scale = float(torch.where(truth.isfinite(), truth, 0.0).norm())
    return float(difference.norm()) / (scale if scale > 0 else 1.0)


def assert_close(got: Tensor, truth: Tensor, eager: Tensor, factor: float, what: str) -> None:
    """Assert error(got) <= factor x error(eager), both against the fp64 truth.

    Args:
        got: the result of the operator under test.
        truth: the same in fp64, from :mod:`zebra.ops.reference`.
        eager: the same maths in eager PyTorch at the dtype of ``got``.
        factor: from tests/tolerances.py.
        what: names the output in the message.
    """
    # Few elements, or powers of two, can leave eager exact by luck: allow the rounding of the
    # dtype, and in wide dtypes the few roundings of a short sum.
    roundings = 0.3 if got.dtype.itemsize == 2 else 1.0
    floor = roundings * torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    error, bound = relative_error(got, truth), factor * max(relative_error(eager, truth), floor)
    assert error <= bound, f"{what}: relative error {error:.3e} > {bound:.3e} ({factor} x eager's)"
