"""The losses of distillation, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zebra import ops

ILD_FORMS = ("mse", "l2", "enhanced")


def ild_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    form: str = "enhanced",
    student_mixers: Sequence[Tensor] | None = None,
    teacher_mixers: Sequence[Tensor] | None = None,
) -> Tensor:
    """Sum over layers of the distance between what student and teacher layers put out.

    Equation::

        mse       sum_l mean_t |s_l - t_l|^2 / D
        l2        sum_l mean_t |s_l - t_l|
        enhanced  l2 + sum_l mean_t |sm_l - tm_l|    (sm, tm: token-mixer outputs)

    Args:
        student: Per layer the student's output, [B, T, D].
        teacher: Per layer the teacher's output, same shapes; not differentiated.
        form: One of ``"mse"``, ``"l2"``, ``"enhanced"``.
        student_mixers: Per layer the student's mixer output, [B, T, D]; for ``"enhanced"``.
        teacher_mixers: Per layer the teacher's attention output, [B, T, D]; for ``"enhanced"``.

    Returns:
        The loss, a scalar fp32 tensor.

    Raises:
        ValueError: Unknown form, different number of layers, or mixers missing for ``"enhanced"``.

    Numerics:
        Differences are taken in fp32, fp64 for fp64 inputs.
    """
    if form not in ILD_FORMS:
        raise ValueError(f"zebra.ild_loss: form must be one of {ILD_FORMS}, got {form!r}")
    if form == "mse":
        return _sum([(s - t).square().mean() for s, t in _pairs(student, teacher)])
    loss = _sum([_norms(s - t).mean() for s, t in _pairs(student, teacher)])
    if form == "l2":
        return loss
    if student_mixers is None or teacher_mixers is None:
        raise ValueError(
            "zebra.ild_loss: form 'enhanced' needs both models' mixer outputs, got none"
        )
    return loss + _sum([_norms(s - t).mean() for s, t in _pairs(student_mixers, teacher_mixers)])


def _pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"zebra.ild_loss: student must have as many layers as the teacher ({len(teacher)}, "
            f"at least 1), got {len(student)}"
        )
    wide = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    return [(s.to(wide), t.detach().to(wide)) for s, t in zip(student, teacher, strict=True)]


def _norms(difference: Tensor) -> Tensor:
    # Where a token already agrees exactly the norm has no gradient: the bound gives 0, not NaN.
    return difference.square().sum(-1).clamp_min(1e-24).sqrt()


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Mean over tokens of the forward KL between the models' next-token distributions.

    Equation::

        T^2 * mean_m KL(softmax(h_t W_t^T / T) || softmax(h_s W_s^T / T))

    The factor T^2 keeps the gradient's size independent of the temperature.

    Args:
        student_hidden: Final hidden states, [..., Ds].
        student_weight: The student's output embedding, [V, Ds].
        teacher_hidden: Final hidden states, [..., Dt]; not differentiated.
        teacher_weight: The teacher's output embedding, [V, Dt]; not differentiated.
        temperature: T, no unit; 1 compares the distributions as they are sampled.

    Returns:
        The loss in nats per token, a scalar fp32 tensor.

    Raises:
        ValueError: The vocabularies differ.

    Numerics:
        ``fused_kl_div`` works in chunks: no [tokens, V] logits of both models are ever held.
    """
    if student_weight.size(0) != teacher_weight.size(0):
        raise ValueError(
            "zebra.kl_loss: student and teacher must share one vocabulary, got "
            f"{student_weight.size(0)} and {teacher_weight.size(0)} tokens"
        )
    divergence = ops.fused_kl_div(
        student_hidden.flatten(0, -2),
        student_weight,
        teacher_hidden.flatten(0, -2).detach(),
        teacher_weight.detach(),
        temperature,
    )
    return divergence.mean() * temperature**2


def next_token_loss(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of predicting tokens[:, 1:] from hidden[:, :-1].

    Args:
        hidden: Final hidden states, [B, T, D].
        weight: The output embedding, [V, D].
        tokens: The token ids, [B, T] int64.

    Returns:
        The loss in nats per token, a scalar fp32 tensor.
    """
    logits = F.linear(hidden[:, :-1], weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
