"""Distillation: layer by layer (ILD), then end to end (KL), in one plain training loop."""

from zebra.distill.config import DistillConfig
from zebra.distill.loss import ild_loss, kl_loss, next_token_loss

__all__ = ["DistillConfig", "ild_loss", "kl_loss", "next_token_loss"]
