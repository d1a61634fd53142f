"""Everything that decides a distillation run, one frozen dataclass a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zebra.distill.loss import ILD_FORMS

STAGES = ("ild", "kd")
PRECISIONS = ("fp32", "bf16")


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a training loop runs; each field's ``help`` gives its unit and its default's reason."""

    out: str = _option("", "folder of the run: metrics.jsonl, checkpoints/, and the final model")
    data: tuple[str, ...] = _option(
        ("stdlib",),
        "text files, JSONL, folders, or `stdlib` (this Python's own source): text on any machine",
    )
    steps: int = _option(
        1000, "optimiser steps; a start for a small model, set it from your tokens"
    )
    batch: int = _option(8, "sequences per micro-batch; as many as memory takes")
    accumulation: int = _option(1, "micro-batches per step; raise it where the batch does not fit")
    length: int = _option(2048, "tokens per sequence; the length of the published recipe")
    learning_rate: float = _option(
        2e-4, "peak, per step; published for ILD of 1B and 3B models (KD there: 8e-5 and 4e-5)"
    )
    warmup: float = _option(0.01, "fraction of the steps with rising rate; the published 1 %")
    final_rate: float = _option(
        0.0, "last learning rate as a fraction of the peak; cosine to 0 as published"
    )
    beta1: float = _option(0.9, "AdamW momentum, no unit; the published default")
    beta2: float = _option(0.999, "AdamW second-moment decay, no unit; the published default")
    weight_decay: float = _option(0.0, "AdamW, per step; 0 as published: the teacher is the prior")
    clip: float = _option(
        1.0, "largest gradient norm, in units of the mean-per-token loss; guards against spikes"
    )
    precision: str = _option(
        "fp32", "fp32 or bf16 (autocast, fp32 master weights); fp32 is right on every machine"
    )
    gradient_checkpointing: bool = _option(
        False, "recompute layers in the backward pass; off, it trades about 30 % time for memory"
    )
    device: str = _option("cpu", "cpu or cuda[:index]; cpu is on every machine")
    seed: int = _option(
        0, "of the data order and every random number; any fixed number repeats a run"
    )
    save_every: int = _option(200, "steps between checkpoints; what a kill can cost")
    keep: int = _option(2, "checkpoints kept; two, so that one unreadable disk block loses little")

    def __post_init__(self) -> None:
        self._require(bool(self.out), "out", "given")
        self._require(self.precision in PRECISIONS, "precision", f"one of {PRECISIONS}")
        self._require(len(self.data) > 0, "data", "at least one source")
        for name in ("steps", "batch", "accumulation", "save_every", "keep"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.length >= 2, "length", "at least 2")
        for name in ("learning_rate", "clip"):
            self._require(getattr(self, name) > 0, name, "above 0")
        for name in ("warmup", "final_rate"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        self._require(self.weight_decay >= 0, "weight_decay", "at least 0")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"zebra.{type(self).__name__}: {name} must be {expected}, "
                f"got {getattr(self, name)!r}"
            )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """One stage of distillation; its fields are the command line's flags and a recipe's keys."""

    teacher: str = _option("", "folder or hub name of the teacher, a Hugging Face causal LM")
    student: str = _option("", "folder of the student, from `zebra convert` or an earlier stage")
    stage: str = _option(
        "kd",
        "ild: every layer learns its teacher layer, fed the teacher's states; "
        "kd: the whole student learns the teacher's next-token distribution",
    )
    temperature: float = _option(1.0, "KD softmax temperature, no unit; 1 as published")
    ce_weight: float = _option(
        0.0, "weight of next-token cross-entropy beside the KL; 0 as published"
    )
    ild_form: str = _option(
        "enhanced", f"{', '.join(ILD_FORMS)}: enhanced also matches mixer outputs and did best"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(bool(self.teacher), "teacher", "given")
        self._require(bool(self.student), "student", "given")
        self._require(self.stage in STAGES, "stage", f"one of {STAGES}")
        self._require(self.ild_form in ILD_FORMS, "ild_form", f"one of {ILD_FORMS}")
        self._require(self.temperature > 0, "temperature", "above 0")
        self._require(self.ce_weight >= 0, "ce_weight", "at least 0")

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """Return the fields by name: their types, defaults and help are the command line's too."""
        return {field.name: field for field in dataclasses.fields(cls)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DistillConfig:
        """Build a config from YAML values or parsed flags, converting each to its field's type.

        Raises:
            ValueError: A key is no field, or a value does not convert.
        """
        fields = cls.fields()
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(
                f"zebra.DistillConfig: keys must be among {', '.join(fields)}, got {unknown}"
            )
        return cls(**{name: _convert(name, fields[name].default, v) for name, v in values.items()})


def _convert(name: str, default: Any, value: Any) -> Any:
    """Convert ``value`` to the type of ``default``: YAML reads 2e-4, for one, as a string."""
    kind = type(default)
    try:
        if kind is tuple:
            return (value,) if isinstance(value, str) else tuple(str(v) for v in value)
        if kind is bool:
            if not isinstance(value, bool):
                raise TypeError
            return value
        if kind is int and float(value) != int(value):
            raise TypeError
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"zebra.DistillConfig: {name} must be {kind.__name__}, got {value!r}"
        ) from None


def read_recipe(
    path: str | Path, overrides: Mapping[str, Any] | None = None
) -> list[DistillConfig]:
    """Read a YAML recipe: one stage, or a list of them under ``stages``.

    Keys outside ``stages`` hold for every stage.  A stage that names no ``student`` goes on from
    the stage before; one that names no ``out`` writes into the recipe's ``out`` under its number
    and name.  ``overrides`` (the command line's flags) hold over all of it.

    Returns:
        The stages in the order they run.

    Raises:
        ValueError: Not a mapping, an unknown key, or a value out of range.
    """
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"zebra.read_recipe: {path} must be a YAML file, got {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"zebra.read_recipe: {path} must hold a mapping, got {recipe!r}")
    stages, overrides = recipe.pop("stages", None), overrides or {}
    if stages is None:
        return [DistillConfig.from_mapping({**recipe, **overrides})]
    if not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages) or not stages:
        raise ValueError(f"zebra.read_recipe: stages must be a list of mappings, got {stages!r}")
    configs: list[DistillConfig] = []
    for number, own in enumerate(stages, start=1):
        merged = {**recipe, **own, **overrides}
        if "out" not in own and "out" in merged:
            merged["out"] = str(Path(merged["out"]) / f"{number}-{merged.get('stage', 'kd')}")
        if "student" not in own and configs:
            merged["student"] = configs[-1].out
        configs.append(DistillConfig.from_mapping(merged))
    return configs
