"""Python halves of the operators: fakes, gradients, and the composites that fill in for kernels.

Every module of :mod:`zebra.ops` calls :func:`fake` and :func:`autograd` beside its public function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_CPU, _CUDA = "CPU", "CUDA"
_composites: set[str] = set()  # operators that composites serve on CUDA
_mixed: set[str] = set()  # operators with a CUDA kernel for 16 bit and a composite for float32
_around: dict[str, str] = {}  # operators that Python serves on CUDA around a kernel: by what
_composite_library = torch.library.Library("zebra", "IMPL")

MIXED = "kernel (bfloat16, float16); composite (float32)"

# The public operators, in the order of the support matrix (csrc/schema.cpp declares them).
OPERATORS = (
    "rms_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "ssd_scan",
    "mamba2_step",
    "mla_project",
    "mla_project_append",
    "mla_attention",
    "mla_decode",
    "linear_decode",
    "fused_kl_div",
)


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the fake (meta) function of ``torch.ops.zebra.<name>``."""
    return torch.library.register_fake(f"zebra::{name}")


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register the gradient formula of ``torch.ops.zebra.<name>``."""
    torch.library.register_autograd(f"zebra::{name}", backward, setup_context=setup_context)


def has_kernel(name: str, key: str) -> bool:
    """Whether a compiled kernel or a composite of ``name`` is registered for a dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"zebra::{name}", key))


def composite(
    name: str, beside_kernel: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the eager form of an operator: it serves CUDA tensors until a kernel exists.

    Args:
        name: the operator.
        beside_kernel: an internal operator of the same schema, through which a CUDA kernel for
            16-bit tensors hands float32 ones to the composite; None: the kernel takes both.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        if beside_kernel is not None:
            _composite_library.impl(beside_kernel, fn, _CUDA)
        if not has_kernel(name, _CUDA):
            _composite_library.impl(name, fn, _CUDA)
            _composites.add(name)
        elif beside_kernel is not None:
            _mixed.add(name)
        return fn

    return register


def around(
    kernel: str, name: str, served: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the CUDA form of an operator that is Python around a compiled kernel.

    Without the kernel nothing is registered, and a :func:`composite` that follows serves.

    Args:
        kernel: the internal operator that must have a compiled CUDA kernel.
        name: the operator.
        served: what the support matrix says of it.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        if has_kernel(kernel, _CUDA) and kernel not in _composites:
            _composite_library.impl(name, fn, _CUDA)
            _around[name] = served
        return fn

    return register


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Record gradients inside a composite.

    An operator's implementation runs below autograd, where ``torch.enable_grad`` alone records
    nothing; a backward pass that differentiates a recomputed forward pass needs both.
    """
    autograd_key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd_key, False), torch.enable_grad():
        yield


def support_matrix() -> dict[str, dict[str, str]]:
    """What serves each operator: ``{"rms_norm": {"cpu": "kernel", "cuda": "kernel"}, ...}``.

    Values: "kernel" (compiled C++ or CUDA), "composite" (eager PyTorch operations under the
    operator's name), "kernel (bfloat16, float16); composite (float32)" where the dtype decides, a
    text that begins with "kernel + " where kernels surround those of a library, "none".  Where the
    CUDA library was not built or loaded, kernels that it holds are reported as the composite that
    serves instead.
    """

    def served(name: str, key: str) -> str:
        if key == _CUDA and name in _composites:
            return "composite"
        if key == _CUDA and name in _mixed:
            return MIXED
        if key == _CUDA and name in _around:
            return _around[name]
        return "kernel" if has_kernel(name, key) else "none"

    return {name: {"cpu": served(name, _CPU), "cuda": served(name, _CUDA)} for name in OPERATORS}


def optional(t: Tensor, given: Tensor | None) -> Tensor | None:
    """A gradient output, or None where the input was None (outputs of shape [0] stand for it)."""
    return t if given is not None else None
