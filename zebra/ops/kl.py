"""Kullback-Leibler divergence of two language models from their last hidden states."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zebra.ops._check import Check, acc_dtype
from zebra.ops._register import autograd, composite, fake

_KEPT_BYTES = 192 << 20  # gradient of the logits that the CPU keeps from forward to backward
_COMPOSITE_LOGIT_BYTES = 512 << 20  # fp32 logits of both models that the composite holds at once


def fused_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) of every token, without ever holding the logits of all tokens.

    Equation:
        log p_S = log_softmax(student_hidden student_weight^T / temperature), p_T alike
        kl = sum_v p_T (log p_T - log p_S)                      (Hinton et al. 2015)

    Args:
        student_hidden: [M, Ds] float32, bfloat16 or float16 (float64 on the CPU).
        student_weight: [V, Ds], the student's output embedding.
        teacher_hidden: [M, Dt]; the width may differ from the student's, and the dtype too (but all
            four are float64, or none is).
        teacher_weight: [V, Dt].
        temperature: positive; the loss of Hinton et al. multiplies kl by temperature^2.

    Returns:
        kl [M] float32 (float64 for float64), in nats.  Gradients flow to the student only.

    Raises:
        RuntimeError: on a wrong shape, dtype, device or temperature.

    Numerics:
        Logits, softmax and sums in fp32 (fp64 for fp64), also from 16-bit inputs: logits are never
        rounded to 16 bits.  Each term of the sum is p_T (exp(d) - 1 - d), d = log p_S - log p_T, so
        that small divergences keep their digits and none is negative.  Memory on the CPU: where a
        gradient will be asked for, the forward pass keeps up to 192 MiB of the gradient of the
        logits (the first tokens), in bf16 for a bf16 student, beside 64 MiB of logits; the backward
        pass computes the logits of further tokens again, in chunks of 64 MiB, with more than one
        chunk also summing the gradient of student_weight in fp32.  On CUDA: 512 MiB of logits and
        temporaries of that size, all logits computed again (more only where 16 tokens exceed it).
        Deterministic.  On CUDA, and for a bf16 student on the CPU, the gradient of the logits is
        rounded to student_hidden's dtype before its matrix products.
    """
    student = (student_hidden, student_weight)
    kept_tokens = 0
    if torch.is_grad_enabled() and any(t.requires_grad for t in student):
        kept_tokens = _kept_tokens(*student)
    with torch.autocast(student_hidden.device.type, enabled=False):
        return torch.ops.zebra.fused_kl_div(
            *student, teacher_hidden, teacher_weight, temperature, kept_tokens
        )[0]


def _gradient_dtype(student_hidden: Tensor, student_weight: Tensor) -> torch.dtype:
    """Of the gradient of the logits that the forward pass keeps on the CPU."""
    both = student_hidden.dtype == student_weight.dtype == torch.bfloat16
    return torch.bfloat16 if both else acc_dtype(student_hidden)


def _kept_tokens(student_hidden: Tensor, student_weight: Tensor) -> int:
    """How many tokens' gradient of the logits is kept for the backward pass."""
    if not student_hidden.is_cpu or student_weight.dim() == 0:
        return 0
    row = _gradient_dtype(student_hidden, student_weight).itemsize * max(1, student_weight.size(0))
    return max(16, _KEPT_BYTES // row // 16 * 16)


def _no_gradient(student_hidden: Tensor, student_weight: Tensor) -> Tensor:
    return student_hidden.new_empty(0, dtype=_gradient_dtype(student_hidden, student_weight))


@fake("fused_kl_div")
def _fused_kl_div_fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
    kept_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kl = student_hidden.new_empty(student_hidden.size(0), dtype=acc_dtype(student_hidden))
    lse = student_hidden.new_empty(student_hidden.size(0), dtype=torch.float64)
    if kept_tokens == 0 or student_hidden.is_cuda:
        return kl, lse, torch.empty_like(lse), _no_gradient(student_hidden, student_weight)
    kept = (torch.sym_min(student_hidden.size(0), kept_tokens) + 15) // 16 * 16
    dtype = _gradient_dtype(student_hidden, student_weight)
    dlogits = kl.new_empty(student_weight.size(0), kept, dtype=dtype)
    return kl, lse, torch.empty_like(lse), dlogits


@fake("fused_kl_div_backward")
def _fused_kl_div_backward_fake(
    dkl: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    dlogits: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return (
        student_hidden.new_empty(student_hidden.shape),
        student_weight.new_empty(student_weight.shape),
    )


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """A product in fp32 (fp64): 16-bit factors of one dtype run on the GPU's matrix units."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(acc_dtype(a)), b.to(acc_dtype(b)))


def _softmax_parts(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log_softmax of the logits [m, V], their log-sum-exp [m] in fp64)."""
    logits = _mm(hidden, weight.t()) / temperature
    top = logits.amax(-1, keepdim=True)
    log_sum = (logits - top).exp().sum(-1, keepdim=True).log()
    return (logits - top) - log_sum, (top.double() + log_sum.double())[:, 0]


def _check(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
) -> None:
    """The checks of csrc/fused_kl_div."""
    check = Check("fused_kl_div")
    check.shape("student_hidden", student_hidden, (-1, -1), "[M, Ds]")
    M, Ds = student_hidden.shape
    check.shape("student_weight", student_weight, (-1, Ds), "[V, Ds]")
    V = student_weight.size(0)
    check.shape("teacher_hidden", teacher_hidden, (M, -1), "[M, Dt]")
    Dt = teacher_hidden.size(1)
    check.shape("teacher_weight", teacher_weight, (V, Dt), "[V, Dt]")
    check.that(V > 0 and Ds > 0, "student_weight", student_weight, "[V, Ds] with V, Ds > 0")
    check.that(Dt > 0, "teacher_weight", teacher_weight, "[V, Dt] with Dt > 0")
    check.floating("student_hidden", student_hidden)
    double = student_hidden.dtype == torch.float64
    want = "float64 like" if double else "float32, bfloat16 or float16 beside"
    for name, t in (
        ("student_weight", student_weight),
        ("teacher_hidden", teacher_hidden),
        ("teacher_weight", teacher_weight),
    ):
        check.floating(name, t)
        check.that((t.dtype == torch.float64) == double, name, t, want, " student_hidden")
        check.same_device(name, t, student_hidden)
    ok = temperature > 0 and math.isfinite(temperature)
    check.that(ok, "temperature", f"{temperature:f}", "positive and finite")


@composite("fused_kl_div")
def _fused_kl_div_composite(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
    kept_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chunks of tokens, each with its whole rows of logits; keeps no gradient."""
    _check(student_hidden, student_weight, teacher_hidden, teacher_weight, temperature)
    Check("fused_kl_div").that(kept_tokens >= 0, "kept_tokens", kept_tokens, "0 or more")
    M, acc = student_hidden.size(0), acc_dtype(student_hidden)
    kl = student_hidden.new_empty(M, dtype=acc)
    lse_s = student_hidden.new_empty(M, dtype=torch.float64)
    lse_t = torch.empty_like(lse_s)
    rows = max(16, _COMPOSITE_LOGIT_BYTES // (2 * acc.itemsize * student_weight.size(0)))
    with torch.autocast(student_hidden.device.type, enabled=False):
        for first in range(0, M, rows):
            at = slice(first, first + rows)
            log_s, lse_s[at] = _softmax_parts(student_hidden[at], student_weight, temperature)
            log_t, lse_t[at] = _softmax_parts(teacher_hidden[at], teacher_weight, temperature)
            p_t, d = log_t.exp(), log_s - log_t
            near = p_t * (torch.expm1(d.clamp(-1, 1)) - d)
            kl[at] = torch.where(d.abs() < 0.5, near, log_s.exp() - p_t - p_t * d).sum(-1)
    return kl, lse_s, lse_t, _no_gradient(student_hidden, student_weight)


@composite("fused_kl_div_backward")
def _fused_kl_div_backward_composite(
    dkl: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    dlogits: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Panels of the vocabulary, each for all tokens: a weight gradient is one product."""
    (M, width), V, acc = student_hidden.shape, student_weight.size(0), acc_dtype(student_hidden)
    dhidden = student_hidden.new_zeros(M, width, dtype=acc)
    dweight = torch.empty_like(student_weight, memory_format=torch.contiguous_format)
    if M == 0:
        return dhidden.to(student_hidden.dtype), dweight.zero_()
    panel = max(256, _COMPOSITE_LOGIT_BYTES // (2 * acc.itemsize * M) // 256 * 256)
    # The largest row gradient is taken out, so that float16 does not underflow.
    scale = dkl.abs().amax().clamp_min(torch.finfo(acc).tiny)
    row = (dkl / scale)[:, None]

    def probabilities(hidden: Tensor, weight: Tensor, lse: Tensor) -> Tensor:
        high = lse.to(acc)  # in two parts, so that logits of 1e4 keep their distance from it
        low = (lse - high).to(acc)
        return ((_mm(hidden, weight.t()) / temperature - high[:, None]) - low[:, None]).exp()

    with torch.autocast(student_hidden.device.type, enabled=False):
        for first in range(0, V, panel):
            at = slice(first, first + panel)
            p_s = probabilities(student_hidden, student_weight[at], student_lse)
            p_t = probabilities(teacher_hidden, teacher_weight[at], teacher_lse)
            dlogits = ((p_s - p_t) * row).to(student_hidden.dtype)
            dhidden += _mm(dlogits.to(student_weight.dtype), student_weight[at])
            dweight[at] = _mm(dlogits.t(), student_hidden) * (scale / temperature)
    return (dhidden * (scale / temperature)).to(student_hidden.dtype), dweight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx: Any, dkl: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dkl is None:
        return None, None, None, None, None, None
    dhidden, dweight = torch.ops.zebra.fused_kl_div_backward(
        dkl, *ctx.saved_tensors, ctx.temperature
    )
    return dhidden, dweight, None, None, None, None


autograd("fused_kl_div", _backward, _setup)
