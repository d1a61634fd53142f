"""Checkpoints that a kill at any instant leaves whole: written aside, made durable, then renamed.

A folder named ``step-N`` is a whole checkpoint by construction, because only a rename makes that
name and only after every byte is on the disk; whatever a kill interrupts still has a working name.
The newest is found by listing, not by a pointer that could dangle.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

STATE_FILE = "trainer.pt"
_WHOLE = re.compile(r"step-(\d+)")
_ASIDE, _TRASH = ".writing-", ".deleting-"


def save_checkpoint(
    root: Path, step: int, model: Any, tokenizer: Any, state: Mapping[str, Any], keep: int
) -> Path:
    """Write ``root/step-N`` so that it either is whole or is not there; then drop the oldest.

    Args:
        root: Folder of the checkpoints; made if missing.
        step: Optimiser steps done.
        model: A ``PreTrainedModel``; the checkpoint is a model folder of its own.
        tokenizer: Saved beside the model.
        state: What the loop needs to go on: optimiser, random numbers, data position.
        keep: Checkpoints to leave; older ones go only once this one is durable.

    Returns:
        The checkpoint's folder.
    """
    root.mkdir(parents=True, exist_ok=True)
    aside, final = root / f"{_ASIDE}{step}", root / f"step-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    save_model(aside, model, tokenizer)
    torch.save(dict(state), aside / STATE_FILE)
    make_durable(aside)
    if final.exists():  # written before, but the run did not get to record it
        _delete(final)
    os.rename(aside, final)
    _sync(root)
    for old in _list(root)[:-keep]:
        _delete(old)
    for leftover in root.glob(".*-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """Return the whole checkpoint with the most steps, or None where there is none."""
    found = _list(root)
    return found[-1] if found else None


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load a saved model folder's weights into ``model``, strictly.

    Raises:
        RuntimeError: Names or shapes differ.
    """
    from safetensors.torch import load_model

    load_model(model, str(folder / "model.safetensors"), strict=True)


def export_model(out: Path, model: Any, tokenizer: Any) -> None:
    """Put a model folder's files into ``out``, each replaced whole."""
    aside = out / f"{_ASIDE}model"
    shutil.rmtree(aside, ignore_errors=True)
    save_model(aside, model, tokenizer)
    make_durable(aside)
    for file in sorted(aside.iterdir()):
        os.replace(file, out / file.name)
    aside.rmdir()
    _sync(out)


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save model and tokenizer as one folder with one weights file."""
    model.save_pretrained(folder, max_shard_size="1000GB")
    tokenizer.save_pretrained(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a small file whole."""
    aside = path.with_name(f"{_ASIDE}{path.name}")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


def make_durable(folder: Path) -> None:
    """Wait until every file of ``folder``, and the folder, is on the disk."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _list(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    steps = [(int(m[1]), p) for p in root.iterdir() if (m := _WHOLE.fullmatch(p.name))]
    return [path for _, path in sorted(steps)]


def _delete(folder: Path) -> None:
    """Take the name away first, so that no half-deleted checkpoint can be found."""
    trash = folder.with_name(f"{_TRASH}{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
