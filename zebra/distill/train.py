"""The training loop: one function from top to bottom, for every stage.

Resuming after a kill gives the numbers of an uninterrupted run: the learning rate is a function of
the step, a batch a function of the stream's position, and weights, optimiser and random numbers
come from the newest whole checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from zebra.data import PackedTokens
from zebra.distill.checkpoint import (
    STATE_FILE,
    export_model,
    latest_checkpoint,
    load_weights,
    save_checkpoint,
    write_text,
)
from zebra.distill.config import TrainConfig

LossFunction = Callable[[Tensor], Tensor]  # token ids [B, T] -> scalar loss
METRICS_FILE = "metrics.jsonl"
DONE_FILE = "done.json"
# Fields that a resumed run may change: where it runs and how often it saves, not what it computes.
FREE_FIELDS = frozenset({"out", "device", "save_every", "keep"})


def train(
    model: Any,
    tokenizer: Any,
    loss_function: LossFunction,
    stream: PackedTokens,
    config: TrainConfig,
    label: str = "train",
) -> dict[str, Any]:
    """Minimise ``loss_function`` over ``stream`` with AdamW, resuming if ``config.out`` has a run.

    Args:
        model: The ``PreTrainedModel`` to train, on its device; those of its weights that require a
            gradient are updated in place.
        tokenizer: Saved with every checkpoint and with the final model.
        loss_function: From token ids [batch, length] int64 to the mean loss of a micro-batch.
        stream: The packed tokens; its position is set by a resumed checkpoint.
        config: The run's constants.
        label: Name on the progress bar.

    Returns:
        The run's summary, also in ``out/done.json``: steps, loss (mean of the last tenth of the
        steps), seconds, tokens, config.

    Raises:
        ValueError: ``out`` holds a run of another config or other data.
        FloatingPointError: The loss or the gradient is not finite.
    """
    out = Path(config.out)
    finished = finished_run(config)
    if finished is not None:
        load_weights(model, out)
        return finished
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    torch.manual_seed(config.seed)
    identity = {**_identity(config), "corpus": _digest(stream)}
    step, seconds = _resume(out, model, optimiser, stream, identity, device)
    metrics = (out / METRICS_FILE).open("a", encoding="utf-8")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    tokens_per_step = config.batch * config.accumulation * config.length
    bar = tqdm(total=config.steps, initial=step, desc=label, unit="step", dynamic_ncols=True)
    started = time.perf_counter() - seconds
    while step < config.steps:
        before = time.perf_counter()
        rate = learning_rate(step, config)
        for group in optimiser.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=device)
        for _ in range(config.accumulation):
            tokens = stream.take(config.batch).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = loss_function(tokens) / config.accumulation
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(trained, config.clip)
        loss_value, norm_value = total.item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise FloatingPointError(
                f"zebra.train: step {step + 1} must have a finite loss and gradient norm, got "
                f"{loss_value} and {norm_value}; lower learning_rate or clip and run again"
            )
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        now = time.perf_counter()
        line = {
            "step": step,
            "loss": loss_value,
            "lr": rate,
            "grad_norm": norm_value,
            "tokens": step * tokens_per_step,
            "tokens_per_second": tokens_per_step / (now - before),
            "seconds": now - started,
        }
        metrics.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{loss_value:.4f}", refresh=False)
        bar.update()
        if step % config.save_every == 0 or step == config.steps:
            metrics.flush()
            os.fsync(metrics.fileno())  # every step of a checkpoint is in the log before it exists
            state = {
                "step": step,
                "seconds": time.perf_counter() - started,
                "position": stream.position,
                "optimiser": optimiser.state_dict(),
                "random": random_state(device),
                "identity": identity,
            }
            save_checkpoint(out / "checkpoints", step, model, tokenizer, state, config.keep)
    bar.close()
    metrics.close()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return _finish(out, model, tokenizer, config, tokens_per_step)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of the step after ``step`` done ones: linear warm-up, then cosine."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)


def finished_run(config: TrainConfig) -> dict[str, Any] | None:
    """Return the summary of the run in ``config.out`` if it is complete, else None.

    Raises:
        ValueError: It was run with another config.
    """
    path = Path(config.out) / DONE_FILE
    if not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _require_same(config.out, summary["identity"], _identity(config))
    return summary


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """Return the run's metrics, one dict a step; a line torn by a kill is left out."""
    path = Path(out) / METRICS_FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator the loop draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _identity(config: TrainConfig) -> dict[str, Any]:
    """Return what two runs must share for one to go on where the other stopped."""
    values = dataclasses.asdict(config).items()
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values if k not in FREE_FIELDS}


def _digest(stream: PackedTokens) -> str:
    return hashlib.sha256(stream.tokens.tobytes()).hexdigest()


def _require_same(out: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    changed = {k: (stored.get(k), v) for k, v in given.items() if stored.get(k) != v}
    if changed:
        raise ValueError(
            f"zebra.train: {out} holds a run that began otherwise; to go on, give what it had: "
            + ", ".join(f"{k}={old!r} (got {new!r})" for k, (old, new) in changed.items())
            + "; or choose another out"
        )


def _resume(
    out: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    stream: PackedTokens,
    identity: Mapping[str, Any],
    device: torch.device,
) -> tuple[int, float]:
    """Restore the newest checkpoint and cut the log back to it; return its step and seconds."""
    checkpoint = latest_checkpoint(out / "checkpoints")
    step, seconds = 0, 0.0
    if checkpoint is not None:
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        _require_same(str(out), state["identity"], identity)
        load_weights(model, checkpoint)
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], device)
        stream.position, step, seconds = state["position"], state["step"], state["seconds"]
    kept = [line for line in read_metrics(out) if line["step"] <= step]
    write_text(out / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))
    return step, seconds


def _finish(
    out: Path, model: Any, tokenizer: Any, config: TrainConfig, tokens_per_step: int
) -> dict[str, Any]:
    """Export the model and write the summary last: its presence says that the run is complete."""
    model.eval()
    export_model(out, model, tokenizer)
    lines = read_metrics(out)
    tail = lines[-max(1, len(lines) // 10) :]
    summary = {
        "steps": config.steps,
        "tokens": config.steps * tokens_per_step,
        "seconds": lines[-1]["seconds"],
        "loss": sum(line["loss"] for line in tail) / len(tail),
        "identity": _identity(config),
    }
    write_text(out / DONE_FILE, json.dumps(summary, indent=2) + "\n")
    return summary
