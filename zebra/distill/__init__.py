"""Distillation: layer by layer (ILD), then end to end (KL), in one plain training loop."""

from zebra.distill.config import DistillConfig, TrainConfig
from zebra.distill.loss import ild_loss, kl_loss, next_token_loss
from zebra.distill.train import LossFunction

__all__ = [
    "DistillConfig",
    "LossFunction",
    "TrainConfig",
    "ild_loss",
    "kl_loss",
    "next_token_loss",
]
