"""The stages of distillation: what each one trains and the loss it minimises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zebra.data import PackedTokens, pack, read_documents
from zebra.distill.config import DistillConfig, TrainConfig
from zebra.distill.loss import ild_loss, kl_loss, next_token_loss
from zebra.distill.taps import LayerTaps
from zebra.distill.train import LossFunction, finished_run, train
from zebra.layers.linear import require_plain


def distill(config: DistillConfig) -> dict[str, Any]:
    """Run one stage of distillation from its config, or go on with it after a kill.

    Args:
        config: The stage: teacher, student, data and training constants.

    Returns:
        The run's summary (see :func:`zebra.distill.train.train`).

    Raises:
        ValueError: The models do not fit together, or the config does not fit the run in ``out``.
    """
    finished = finished_run(config)
    if finished is not None:
        return finished
    teacher = load_model(config.teacher, config.device, config.precision)
    student = load_model(config.student, config.device, "fp32")
    tokenizer = load_tokenizer(config.student)
    stream = open_stream(config, tokenizer)
    with objective(student, teacher, config) as loss:
        return train(student, tokenizer, loss, stream, config, label=config.stage)


@contextlib.contextmanager
def objective(student: Any, teacher: Any, config: DistillConfig) -> Iterator[LossFunction]:
    """Yield the stage's loss, with gradients on for what the stage trains and off for the rest.

    Layer-wise distillation trains the layers, not the embedding, final norm and output head;
    end-to-end distillation trains everything.

    Args:
        student: The model to train.
        teacher: The model to learn from.
        config: Names the stage and its constants.

    Raises:
        ValueError: The models do not fit together.
    """
    check_pair(teacher, student, config.stage)
    teacher.requires_grad_(False)
    if config.stage == "kd":
        student.requires_grad_(True)
        yield kd_objective(student, teacher, config)
        return
    student.requires_grad_(False)
    student.base_model.layers.requires_grad_(True)
    with LayerTaps(teacher) as seen, LayerTaps(student) as made:
        yield ild_objective(student, teacher, made, seen, config.ild_form)


def ild_objective(
    student: Any, teacher: Any, made: LayerTaps, seen: LayerTaps, form: str
) -> LossFunction:
    """Return the loss of layer-wise distillation: layer l is fed the teacher's layer-l input.

    Args:
        student: The model to train.
        teacher: The same-shaped model whose layers are the targets.
        made: Taps on the student.
        seen: Taps on the teacher.
        form: The form of :func:`zebra.distill.loss.ild_loss`.
    """

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            teacher.base_model(tokens, use_cache=False)
        made.feed = list(seen.inputs)
        student.base_model(tokens, use_cache=False)
        return ild_loss(made.outputs, seen.outputs, form, made.mixers, seen.mixers)

    return loss


def kd_objective(student: Any, teacher: Any, config: DistillConfig) -> LossFunction:
    """Return the loss of end-to-end distillation: forward KL, plus cross-entropy if weighted.

    Args:
        student: The model to train.
        teacher: The model whose next-token distribution is the target.
        config: Gives temperature, ce_weight and precision.

    Raises:
        ValueError: If a head is more than its weight, which is all that the loss takes of it.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for name, model in (("student", student), ("teacher", teacher)):
        require_plain(
            model.get_output_embeddings(), f"kd_objective: the {name}'s output embeddings"
        )

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher.base_model(tokens, use_cache=False).last_hidden_state
        hidden = student.base_model(tokens, use_cache=False).last_hidden_state
        weight = student.get_output_embeddings().weight
        value = kl_loss(
            hidden.to(dtype),
            weight.to(dtype),
            target.to(dtype),
            teacher.get_output_embeddings().weight.to(dtype),
            config.temperature,
        )
        if config.ce_weight:
            value = value + config.ce_weight * next_token_loss(hidden, weight, tokens)
        return value

    return loss


def check_pair(teacher: Any, student: Any, stage: str) -> None:
    """Raise ValueError if the student cannot learn from the teacher in this stage."""
    sizes = {"vocab_size": (teacher.config.vocab_size, student.config.vocab_size)}
    if stage == "ild":
        for name in ("num_hidden_layers", "hidden_size"):
            sizes[name] = (getattr(teacher.config, name), getattr(student.config, name))
    for name, (expected, got) in sizes.items():
        if expected != got:
            raise ValueError(
                f"zebra.distill: stage {stage} needs the student's {name} to be the teacher's "
                f"{expected}, got {got}"
            )


def open_stream(config: TrainConfig, tokenizer: Any) -> PackedTokens:
    """Tokenize the config's data and pack it into blocks of its length."""
    return PackedTokens(pack(read_documents(config.data), tokenizer), config.length, config.seed)


def load_model(path: str, device: str, precision: str = "fp32") -> Any:
    """Load a causal LM, Zebra or any other, ready to evaluate on ``device``.

    Raises:
        ValueError: There is no such model.
    """
    from transformers import AutoModelForCausalLM

    import zebra.models  # noqa: F401  (registers the Zebra classes)

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} must be a model folder or hub name: {error}") from error
    return model.to(device).eval()


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        ValueError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path!r} must be a model folder or hub name with a tokenizer: {error}"
        ) from error
